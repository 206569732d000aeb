"""The stages of a study."""

from dataclasses import dataclass, field

EVERYTHING = "*"


@dataclass(frozen=True)
class Input:
    """A parameter that names an artifact of another stage, as `stage/key` or as that artifact's folder.

    Left empty, the artifact is made with the other notebook's defaults and the parameters named in `passes`
    (`EVERYTHING`: all of them); an `optional` input stays empty; an input that `follows` others is needed exactly when one
    of those is given; `many` is a list, and empty means every finished artifact of the stage. An artifact that is
    named must have been made with the same values of the parameters in `agrees`.
    """

    stage: str
    passes: tuple[str, ...] = ()
    optional: bool = False
    follows: tuple[str, ...] = ()
    many: bool = False
    agrees: tuple[str, ...] = ("model",)


@dataclass(frozen=True)
class Stage:
    """One step of the study: its notebook, and the parameters of the notebook that are artifacts of earlier stages."""

    name: str
    notebook: str
    inputs: dict[str, Input] = field(default_factory=dict)


STAGES = {
    stage.name: stage
    for stage in (
        Stage("calibration", "01_calibration.ipynb"),
        Stage("scoring", "02_scoring.ipynb", {"calibration": Input("calibration", passes=("model", "seed"))}),
        Stage("pruning", "03_pruning.ipynb", {"scores": Input("scoring", passes=("model", "seed", "device"))}),
        Stage("recovery", "04_recovery.ipynb", {"pruned": Input("pruning", optional=True)}),
        Stage(
            "evaluation",
            "05_evaluation.ipynb",
            {
                "pruned": Input("pruning", optional=True),
                "recovered": Input("recovery", optional=True, agrees=("model", "pruned")),
                "reference": Input(
                    "evaluation",
                    passes=(EVERYTHING,),
                    follows=("pruned", "recovered"),
                    agrees=("model", "perplexity_corpora", "n_windows", "seq_len", "fidelity_positions", "seed", "bos", "dtype"),
                ),
            },
        ),
        Stage("figures", "06_figures.ipynb", {"evaluations": Input("evaluation", many=True)}),
        Stage("cost", "07_cost.ipynb"),
        Stage("experiments", "08_experiments.ipynb"),
        Stage(
            "questions",
            "09_questions.ipynb",
            {
                "evaluations": Input("evaluation", many=True),
                "scorings": Input("scoring", many=True),
                "prunings": Input("pruning", many=True),
                "experiments": Input("experiments", many=True),
            },
        ),
    )
}
