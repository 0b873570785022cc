"""The catalogue of findings: every doubt the harness can raise about an evaluation, with what to do about it."""

from dataclasses import dataclass

from robustbench_x.result import Finding, Level

__all__ = ["FINDINGS", "FindingKind", "finding", "render_page"]


@dataclass(frozen=True, kw_only=True)
class FindingKind:
    """A kind of finding. `error`: the figures it concerns cannot be trusted, or would flatter the defender."""

    level: Level
    title: str
    advice: str
    source: str


FINDINGS: dict[str, FindingKind] = {
    "sample_errors": FindingKind(
        level="error",
        title="samples could not be judged",
        advice="Read the first message; fix the attack, defence or data and run again. Error rows are never robust.",
        source="ours",
    ),
    "nothing_to_attack": FindingKind(
        level="error",
        title="no sample is classified correctly when clean",
        advice="Check the head, the class order and the preprocessing: an attack success rate needs correct samples.",
        source="ours",
    ),
    "not_logits": FindingKind(
        level="error",
        title="the head returns probabilities, not logits",
        advice="Remove the softmax: it flattens the gradient and the victim looks more robust than it is.",
        source="AutoAttack, check of the output range",
    ),
    "nonfinite_output": FindingKind(
        level="error",
        title="the victim returns NaN or infinity",
        advice="Fix the model or defence; a prediction from NaN means nothing.",
        source="ours",
    ),
    "nonfinite_gradient": FindingKind(
        level="error",
        title="the gradient holds NaN or infinity",
        advice="Gradient attacks are blind here; use a stand-in gradient (BPDA) or fix the operation.",
        source="ours",
    ),
    "zero_gradient": FindingKind(
        level="error",
        title="the gradient is exactly zero",
        advice="The gradient is masked: judge this victim by bpda, transfer and query attacks, not by this cell.",
        source="AutoAttack; Pintor et al. 2022, indicator 1; Athalye et al. 2018",
    ),
    "broken_graph": FindingKind(
        level="error",
        title="no gradient reaches the pixels",
        advice="The victim detaches its input; attack it through bpda, or register a differentiable stand-in.",
        source="Pintor et al. 2022, indicator 1",
    ),
    "probe_failed": FindingKind(
        level="error",
        title="a check of the victim could not run",
        advice="Read the message: what breaks the check most likely breaks the attacks too.",
        source="ours",
    ),
    "misleading_gradient": FindingKind(
        level="error",
        title="the gradient does not predict how the output changes",
        advice="It is shattered or forged; judge this victim by bpda, transfer and query attacks.",
        source="Athalye et al. 2018 (shattered gradients); the finite-difference test is ours",
    ),
    "saturated_loss": FindingKind(
        level="warning",
        title="the cross-entropy has a gradient of exactly zero",
        advice="The logits are too large for it: attack with loss=margin or dlr, or with apgd_t.",
        source="Carlini & Wagner 2017 (defensive distillation); Pintor et al. 2022",
    ),
    "batch_dependence": FindingKind(
        level="error",
        title="the answer to an image depends on the others of its batch",
        advice="Judge images alone: fix the defence or model (batch statistics?), or no verdict here can be repeated.",
        source="ours",
    ),
    "undeclared_randomness": FindingKind(
        level="error",
        title="the victim answers differently to the same images",
        advice="Declare the defence stochastic, so that it is judged on fresh draws and attacked with EOT.",
        source="AutoAttack, check of randomness",
    ),
    "budget_overrun": FindingKind(
        level="error",
        title="the attack left its budget and was projected back",
        advice="Fix the attack: what was judged is not what it made.",
        source="ours",
    ),
    "idle_attack": FindingKind(
        level="error",
        title="the attack hardly touched most of the images it did not break",
        advice="It did not attack those samples; raise its steps or step size, or look for a swallowed error.",
        source="Pintor et al. 2022, indicator 3",
    ),
    "weaker_than_noise": FindingKind(
        level="error",
        title="noise of the same size does more damage",
        advice="The attack is broken or its gradient is masked; its robust accuracy is no evidence. "
        "A warning only, where the attacker is blind to the head or the defence.",
        source="Carlini et al. 2019",
    ),
    "no_better_than_noise": FindingKind(
        level="error",
        title="the samples that resist are no nearer to the boundary than after noise",
        advice="The attack walks in no useful direction: its gradient is masked, saturated or of the wrong sign.",
        source="ours; Carlini et al. 2019 compare success rates only",
    ),
    "noise_breaks_others": FindingKind(
        level="warning",
        title="noise breaks samples the attack does not",
        advice="Give the attack more steps or restarts.",
        source="Carlini et al. 2019, per-example inversion",
    ),
    "bpda_beats_full": FindingKind(
        level="warning",
        title="ignoring the defence's gradient beats using it",
        advice="The defence's own gradient misleads the attack: read the bpda row, not the full one.",
        source="Athalye et al. 2018",
    ),
    "chance_head": FindingKind(
        level="warning",
        title="clean accuracy is not above chance",
        advice="The head has learned nothing here; an attack success rate on it says little.",
        source="ours",
    ),
    "constant_prediction": FindingKind(
        level="error",
        title="the victim gives every clean image the same class",
        advice="A constant cannot be fooled and is worth nothing: check the head, the defence and the preprocessing.",
        source="ours",
    ),
    "only_controls": FindingKind(
        level="error",
        title="nothing but controls attacked",
        advice="Add an attack: noise is no evidence of robustness.",
        source="ours",
    ),
    "zero_budget": FindingKind(
        level="error",
        title="the budget allows no change",
        advice="Raise eps: what is reported as robust accuracy is the clean accuracy.",
        source="ours",
    ),
    "no_adaptive_attack": FindingKind(
        level="error",
        title="no attack knew the defence",
        advice="Allow knowledge bpda or full, or a query attack: images made without it say little about a defence.",
        source="Carlini et al. 2019; Tramer et al. 2020",
    ),
    "eight_bit_loss": FindingKind(
        level="note",
        title="part of the success does not survive rounding to 8 bit",
        advice="Read asr_8bit where images travel as files.",
        source="ours",
    ),
    "few_samples": FindingKind(
        level="note",
        title="fewer than 30 correct samples",
        advice="Intervals are wide; raise --samples before you gate on this.",
        source="ours",
    ),
    "unreadable_images": FindingKind(
        level="warning",
        title="training images could not be read",
        advice="Repair or remove the named files; the head was fitted without them.",
        source="ours",
    ),
    "barely_tuned": FindingKind(
        level="warning",
        title="a tuned victim is hardly another network than the public encoder",
        advice="Read its figures as those of a linear head; give it more training images before you call it tuned.",
        source="ours",
    ),
    "tuned_below_probe": FindingKind(
        level="warning",
        title="a tuned victim is worse on held-out images than the linear head it started from",
        advice="Nobody would ship it: give it more training images, or audit another scheme.",
        source="ours",
    ),
    "stretched_artifact": FindingKind(
        level="warning",
        title="a pattern is used otherwise than it was fitted for",
        advice="Fit it for this budget, place and size: a pattern that is scaled or moved is weaker than one made for "
        "it. A note only, where a linf pattern is scaled down.",
        source="ours",
    ),
    "surrogate_overlap": FindingKind(
        level="warning",
        title="evaluated images were among the surrogate images",
        advice="Fit on other images: an attacker with encoder access has no downstream data, so this one saw too much.",
        source="ours",
    ),
}


def finding(kind: str, message: str, cell: str | None = None) -> Finding:
    """A finding of a known kind about `cell`, or about the run."""
    return Finding(id=kind, level=FINDINGS[kind].level, message=message, cell=cell)


def render_page() -> str:
    """The documentation's page of findings, as Markdown."""
    lines = [
        "# Findings",
        "",
        "Every doubt the harness can raise about an evaluation. `error`: the figures it concerns cannot be trusted;",
        "with a policy or `--strict` the run ends with exit code 4. This page is made from the catalogue in",
        "`robustbench_x/findings.py` (`RBX_REGENERATE=1 make test`).",
    ]
    for name, kind in FINDINGS.items():
        lines += ["", f"## {name}", "", f"**{kind.level}**: {kind.title}. {kind.advice}", "", f"Source: {kind.source}."]
    return "\n".join(lines) + "\n"
