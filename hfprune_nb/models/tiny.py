"""The tiny random model of the smoke study: a LLaMA whose weights and tokenizer are the same wherever it is written."""

from pathlib import Path

import torch

NAME = "tiny-random-llama"

# Pairs of tokens that the tokenizer merges, in this order (Ġ is a space): learnt once, from a page about models.
_MERGES = """
Ġ Ġ Ġ a a t e r t h Ġ f Ġ o Ċ ĠĠ Ġ th d e e d l a Ġ i - - Ġa n ĊĠĠ Ġ Ġth e e n m o Ġ ( Ġ ` Ġ s l o n e o r Ġ mo Ġo r Ġ b Ġ
h Ġ la de l Ġi n Ġan d a l c e i o o l t en Ġ c Ġ d at e lo at Ġmo del io n ) . a g a m l i p e t o t s t ion u s Ġ : Ġ e
Ġ n Ġf or ĊĠĠ ĠĠ -- -- ol d ten tion am e ' s ) , 1 6 U s a c a r e s g u i z i ce o w p r s t t y t er t tention v ice Ċ
ĊĠĠĠ Ġ G Ġ w Ġ de Ġa ttention Ġf loat Ġo f Ġth at Ġd ty ag e Ġdty pe L P M LP P Us ` , ` ), a d a n a s a la a us c h c ed
d a d u f loat g at g ate i s i th k en n gu n ced o t p u s h u b u p u to u da v er y er Ġ = Ġ R Ġ x Ġ li Ġ to
"""


def write(folder: Path) -> None:
    """Write model and tokenizer into a folder, as a plain checkpoint in bfloat16."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    parts = _MERGES.split()
    merges = list(zip(parts[::2], parts[1::2], strict=True))
    tokens = ["<s>", "</s>", *sorted(pre_tokenizers.ByteLevel.alphabet()), *("".join(pair) for pair in merges)]
    bpe = Tokenizer(models.BPE({token: number for number, token in enumerate(tokens)}, merges))
    bpe.pre_tokenizer, bpe.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    bpe.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in tokens[:2]])
    PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token="<s>", eos_token="</s>").save_pretrained(folder)
    config = LlamaConfig(
        vocab_size=len(tokens), hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=512, tie_word_embeddings=True, bos_token_id=0, eos_token_id=1,
        initializer_range=0.2,
    )  # fmt: skip
    with torch.random.fork_rng(range(torch.cuda.device_count())):
        torch.manual_seed(0)
        LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
