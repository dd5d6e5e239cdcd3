"""Join neighbouring windows with the same label to events."""

from collections.abc import Iterable

from tagging.files import TaggedWindow


def merge_events(windows: Iterable[TaggedWindow]) -> list[TaggedWindow]:
    """Join windows that touch or overlap and have the same label.

    Args:
        windows: in the order of their starts, with the tags that reached the threshold.

    Returns:
        An event for each stretch of a label, from the start of its first window to the end of its last, with the
        highest probability among them; in the order of starts, those of one start by decreasing probability.
    """
    open_events: dict[str, TaggedWindow] = {}
    events: list[TaggedWindow] = []
    for window in windows:
        for label, probability in window.tags:
            event = open_events.get(label)
            if event is not None and window.start <= event.end + 1e-9:
                event.end = max(event.end, window.end)
                event.tags = [(label, max(probability, event.tags[0][1]))]
            else:
                open_events[label] = TaggedWindow(window.start, window.end, [(label, probability)])
                events.append(open_events[label])
    return sorted(events, key=lambda event: (event.start, -event.tags[0][1]))
