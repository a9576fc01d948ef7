"""The head of the report: the run in a paragraph, and in a row of figures."""

from megatron_tikmix.monitoring.decision import moves
from megatron_tikmix.monitoring.formatting import DASH, count, number, percent
from megatron_tikmix.monitoring.history import RunHistory
from megatron_tikmix.monitoring.page import text, tiles


def summary(title: str, history: RunHistory) -> str:
    """Title, words and figures, as HTML."""
    length = history.sequence_length
    figures = [
        (count(history.samples * (length or 1)), f"{'tokens' if length else 'samples'} trained on"),
        (str(len(history.stages)), f"stages of the mixture, {len(history.domains)} domains"),
        (_first_and_last(history), "mean task loss"),
        (percent(history.probe_token_share), "of all tokens went to the probe"),
        (percent(history.probe_time_share), "of the time went to the probe"),
    ]
    words = in_words(history).replace(" %", "\N{NO-BREAK SPACE}%")
    head = text("h1", title) + text("p", words, "lead")
    return f"<header>{head}</header>{tiles(figures)}"


def in_words(history: RunHistory) -> str:
    """The run so far, in a few sentences."""
    return " ".join(
        filter(None, [_model(history), _mixture(history), _losses(history), _probe(history)])
    )


def _first_and_last(history: RunHistory) -> str:
    means = [number(mean, 2) for mean in history.mean_task_loss.values()]
    return " → ".join([means[0], *means[1:][-1:]]) if means else DASH


def _model(history: RunHistory) -> str:
    layers = history.setting("model", "num_layers")
    hidden = history.setting("model", "hidden_size")
    size = f" of {layers} layers and hidden size {hidden}" if layers and hidden else ""
    planned = history.setting("train", "train_iters")
    of_planned = f" of {planned:,}" if isinstance(planned, int) else ""
    return f"A GPT{size}, trained for {history.iteration:,}{of_planned} iterations."


def _mixture(history: RunHistory) -> str:
    if len(history.stages) < 2:
        return "The mixture has not been reconsidered yet."
    resets = len(history.stages) - 1
    kept = sum(row.get("source") == "kept" for row in history.stages)
    words = f"The mixture was reconsidered at {resets} boundar{'y' if resets == 1 else 'ies'}"
    words += f", and kept at {kept} of them." if kept else "."
    first, last = history.stages[0]["weights"], history.stages[-1]["weights"]
    largest = [move.in_words() for move in moves(first, last)[:3] if move.change]
    return words + (f" What moved most since the start: {'; '.join(largest)}." if largest else "")


def _losses(history: RunHistory) -> str:
    means = list(history.mean_task_loss.items())
    if len(means) < 2:
        return ""
    (start, first), (end, last) = means[0], means[-1]
    return (
        f"The mean loss over {len(history.task_losses[end])} tasks went from {number(first)} "
        f"(iteration {start:,}) to {number(last)} (iteration {end:,})."
    )


def _probe(history: RunHistory) -> str:
    if not history.measured or history.probe_token_share is None:
        return ""
    return (
        f"Measuring influence took {percent(history.probe_token_share)} of all tokens processed "
        f"and {percent(history.probe_time_share)} of the time."
    )
