"""The explorer's controls: a model, criteria, a ratio and a prompt; every change is answered at once."""

import io
from collections.abc import Callable
from html import escape

import ipywidgets

from hfprune_nb import allocations, models
from hfprune_nb.errors import UserError
from hfprune_nb.explore.session import Answer, Session
from hfprune_nb.report import one_prompt

_LABEL = {"description_width": "80px"}


class Panel:
    """Widgets over a session; `widget` is what a notebook displays.

    load : makes a session from a model's name, for the button; chosen, ratio, allocation, prompt, new_tokens : where the
    controls stand at first, as `Session.ask` takes them. `answer` is the last one. A change that cannot be answered is told in
    one sentence in `status`, and what was shown before stays.
    """

    def __init__(
        self, session: Session, load: Callable[[str], Session], chosen: list[str], ratio: float, allocation: str | dict,
        prompt: str, new_tokens: int = 12,
    ):  # fmt: skip
        self.session, self._load, self.answer = session, load, None
        style = {"style": _LABEL, "layout": ipywidgets.Layout(width="400px")}
        late = {"continuous_update": False}
        names = list(dict.fromkeys([session.name, *models.aliases()]))
        self.model = ipywidgets.Combobox(
            value=session.name, options=names, description="Model", placeholder="alias, hub id or folder", **style
        )
        self.load = ipywidgets.Button(
            description="Load", tooltip="scores that are missing take minutes, once", layout=ipywidgets.Layout(width="70px")
        )
        self.criteria = ipywidgets.SelectMultiple(description="Criteria", rows=5, **style)
        self.ratio = ipywidgets.FloatSlider(
            ratio, min=0.01, step=0.01, description="Ratio", readout_format=".0%", **late, **style
        )
        self.allocation = ipywidgets.Dropdown(description="Allocation", **style)
        self.new_tokens = ipywidgets.IntSlider(new_tokens, min=1, max=48, description="New tokens", **late, **style)
        self.prompt = ipywidgets.Textarea(
            prompt, description="Prompt", rows=3, **late, style=_LABEL, layout=ipywidgets.Layout(width="98%")
        )
        self.status, self.view = ipywidgets.HTML(), ipywidgets.HTML()
        self.removed = ipywidgets.Image(format="png", layout=ipywidgets.Layout(align_self="flex-start", max_width="98%"))
        self._offer(chosen, allocation)
        self.load.on_click(self._replace)
        for control in (self.criteria, self.ratio, self.allocation, self.new_tokens, self.prompt):
            control.observe(self._changed, "value")
        left = ipywidgets.VBox([ipywidgets.HBox([self.model, self.load]), self.criteria])
        right = ipywidgets.VBox([self.ratio, self.allocation, self.new_tokens])
        controls = ipywidgets.HBox([left, right], layout=ipywidgets.Layout(flex_flow="row wrap"))
        self.widget = ipywidgets.VBox([controls, self.prompt, self.status, self.view, self.removed])
        self.ask()

    def ask(self) -> Answer | None:
        """Show the answer to the controls as they stand, and return it; None where there is none, which `status` explains."""
        session = self.session
        self._say("…")
        try:
            answer = session.ask(
                self.prompt.value, list(self.criteria.value), self.ratio.value, self.allocation.value, self.new_tokens.value
            )
        except UserError as error:
            self._say(str(error))
            return None
        gone = {name: plan.neuron_ratio for name, plan in answer.plans.items()}
        table = one_prompt.summary(answer.positions, gone, session.legend)
        parts = (
            one_prompt.next_tokens_html(answer.next_tokens, session.legend),
            one_prompt.strip_html(answer.positions, answer.written, session.legend),
            table.rename_axis(None).to_html(float_format="%.3g", border=0, justify="left"),
        )
        # Lines of a text widget are as high as its buttons.
        self.view.value = f'<div style="line-height:1.5">{"".join(parts)}</div>'
        first = next(iter(answer.kept), None)
        figure = one_prompt.removed_figure(answer.kept, session.importance.get(first, []), session.legend)
        figure.savefig(picture := io.BytesIO(), dpi=100)
        self.removed.value = picture.getvalue()
        self._say(f"{session.name}: answered in {answer.seconds:.2f} s")
        self.answer = answer
        return answer

    def _offer(self, chosen, allocation):
        """Set the controls to what the session holds, without an answer to each."""
        session = self.session
        self.criteria.options = [(session.legend.label(name), name) for name in session.importance]
        self.criteria.value = [name for name in chosen if name in session.importance] or list(session.importance)[:1]
        offered = [*([allocation] if isinstance(allocation, dict) else []), *session.allocations()]
        self.allocation.options = [(variant.label, variant.spec) for name in offered for variant in allocations.variants(name)]
        self.allocation.value = allocation if allocation in offered else "uniform"
        self.ratio.max = session.highest_ratio

    def _changed(self, _):
        self.ask()

    def _replace(self, _):
        self._say(f"{self.model.value}: loading; where it has no scores yet, stages 01 and 02 make them, which takes minutes")
        self.load.disabled = True
        try:
            session = self._load(self.model.value)
        except UserError as error:
            self._say(str(error))
            return
        finally:
            self.load.disabled = False
        chosen, allocation, self.session = list(self.criteria.value), self.allocation.value, session
        controls = (self.criteria, self.allocation, self.ratio)
        for control in controls:
            control.unobserve(self._changed, "value")
        self._offer(chosen, allocation)
        for control in controls:
            control.observe(self._changed, "value")
        self.ask()

    def _say(self, sentence):
        self.status.value = escape(sentence)
