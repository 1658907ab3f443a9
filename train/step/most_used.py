"""What is worth keeping for the keys that are used most, where there is no room for all of them.

Forgetting what was not used for longest would make a thing for every key that comes twice in a while, and throw it away
before it comes again, as soon as there are a few more keys than places. So a newcomer must have been used clearly more
often than one that is kept. Of keys that come equally often those that are kept stay.
"""

from collections.abc import Hashable
from typing import Generic, TypeVar

Key = TypeVar("Key", bound=Hashable)
Kept = TypeVar("Kept")

# Uses after which all counts are halved, for each place: what comes no more loses its place to what does.
USES_OF_A_PLACE = 32


class MostUsed(Generic[Key, Kept]):
    """Counts the uses of every key, and keeps something for those that come most.

    Which keys are admitted depends on the order of uses alone.

    Args:
        most: things that are kept.
        occurrences: uses that a key needs at least.
        margin: by how many uses more, since counts were begun or halved, a newcomer must lead to take a place.

    Raises:
        ValueError: a number is not positive.
    """

    def __init__(self, most: int, occurrences: int, margin: int) -> None:
        if min(most, occurrences, margin) < 1:
            raise ValueError(f"most={most}, occurrences={occurrences}, margin={margin}: all must be at least 1")
        self.most = most
        self.occurrences = occurrences
        self.margin = margin
        self._kept: dict[Key, Kept] = {}
        self._counts: dict[Key, int] = {}
        self._uses = 0

    def use(self, key: Key) -> Kept | None:
        """Count a use of a key. Returns what is kept for it."""
        self._counts[key] = self._counts.get(key, 0) + 1
        self._uses += 1
        if self._uses % (USES_OF_A_PLACE * self.most) == 0:
            halved = {other: count // 2 for other, count in self._counts.items()}
            self._counts = {other: count for other, count in halved.items() if count or other in self._kept}
        return self._kept.get(key)

    def make_room(self, key: Key) -> bool:
        """Whether something is to be kept for a key that has nothing yet; drops what has to go for it."""
        count = self._counts.get(key, 0)
        if count < self.occurrences:
            return False
        if len(self._kept) == self.most:
            least = min(self._kept, key=self._counts.__getitem__)
            if count < self._counts[least] + self.margin:
                return False
            del self._kept[least]
        return True

    def keep(self, key: Key, thing: Kept) -> None:
        """Keep something for a key that there is room for."""
        self._kept[key] = thing
