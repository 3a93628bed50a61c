"""Replay on the learner's device: the dataset once, one ring of model transitions per member.

A row holds one transition, columns `[s, a, r, d, s']` (widths S, A, 1, 1, S), so a minibatch of all members is one
gather and `[s, a]` is a slice of it. d is 1 for true terminals only: a time limit does not end the value of a state.

Beside every row lies a tag of two bytes that says where in which rollout it was made (see `agents.rollout`), 0 for what
no rollout has made. Updates do not look at it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def transition_rows(obs: Tensor, action: Tensor, reward: Tensor, done: Tensor, next_obs: Tensor) -> Tensor:
    """Join columns of shapes (..., S), (..., A), (...), (...), (..., S) to rows (..., 2S + A + 2)."""
    return torch.cat((obs, action, reward.unsqueeze(-1), done.unsqueeze(-1).to(obs.dtype), next_obs), dim=-1)


class Replay:
    """Rows to learn from: `real` shared by the pack, and a ring of `capacity` model rows for each member.

    Args:
        real: `(N, W)` rows of the dataset; N may be 0.
        num_members: M.
        capacity: rows of each member's ring (0: none).
        device: the learner's device; rows are kept and gathered there.

    Attributes:
        tags: `(N + M * capacity,)` int16, of the row numbers that `gather` takes.
    """

    def __init__(self, real: Tensor, num_members: int, capacity: int, device: torch.device | str = "cpu") -> None:
        self.num_real, self.width = real.shape
        self.num_members, self.capacity = num_members, capacity
        # allocated at once, touched (and so backed by memory) only as the rings fill
        self.device = torch.device(device)
        self._rows = torch.empty((self.num_real + num_members * capacity, self.width), device=device)
        self._rows[: self.num_real] = real.to(device)
        self.tags = torch.zeros(len(self._rows), dtype=torch.int16, device=device)
        self.sizes = [0] * num_members
        self._cursors = [0] * num_members

    def _start(self, member: int) -> int:
        return self.num_real + member * self.capacity

    def add(self, member: int, rows: Tensor, tags: Tensor | None = None) -> None:
        """Append rows `(n, W)` to a member's ring, with tags `(n,)` or 0; a full ring forgets its oldest."""
        if len(rows) > self.capacity:
            raise ValueError(f"{len(rows)} rows do not fit a ring of {self.capacity}")
        start, cursor = self._start(member), self._cursors[member]
        count = len(rows)
        if count == 0:
            return
        first = min(count, self.capacity - cursor)
        for at, begin, end in ((start + cursor, 0, first), (start, first, count)):
            if begin == end:
                continue
            self._rows[at : at + end - begin].copy_(rows[begin:end])
            place = self.tags[at : at + end - begin]
            if tags is None:
                place.zero_()
            else:
                place.copy_(tags[begin:end])
        self._cursors[member] = (cursor + count) % self.capacity
        self.sizes[member] = min(self.sizes[member] + count, self.capacity)

    def keep_newest(self, member: int, count: int) -> None:
        """Forget all rows of a member's ring but the `count` added last."""
        start, size = self._start(member), self.sizes[member]
        oldest = self._cursors[member] if size == self.capacity else 0
        order = torch.arange(size - count, size, device=self.device).add_(oldest).remainder_(max(size, 1)).add_(start)
        self._restore(member, self._rows[order], self.tags[order], count % self.capacity)

    def draw_indices(
        self, member: int, num_updates: int, num_real: int, num_model: int, generator: torch.Generator
    ) -> Tensor:
        """Uniform draws with replacement for a chunk of updates.

        Returns:
            `(num_updates, num_real + num_model)` row numbers for `gather`, on the generator's device.
        """
        parts, device = [], generator.device
        if num_real:
            parts.append(torch.randint(self.num_real, (num_updates, num_real), generator=generator, device=device))
        if num_model:
            drawn = torch.randint(self.sizes[member], (num_updates, num_model), generator=generator, device=device)
            parts.append(drawn + self._start(member))
        return torch.cat(parts, dim=1)

    def row_numbers(self, places_MB: Tensor) -> Tensor:
        """Row numbers for `gather`: places in [0, 1) among the real rows and those of each member's ring, which hold
        equally many."""
        numbers = (places_MB * self.rows_held).long()
        if not self.sizes[0] or self.num_members == 1:
            return numbers
        # the rings lie one behind the other
        own = numbers + torch.arange(self.num_members, device=self.device).unsqueeze(1) * self.capacity
        return torch.where(numbers < self.num_real, numbers, own) if self.num_real else own

    @property
    def rows_held(self) -> int:
        """Rows that minibatches of a member are drawn from, real ones included, where all rings hold equally many."""
        return self.num_real + self.sizes[0]

    def gather(self, indices_MB: Tensor) -> Tensor:
        """Rows `(M, B, W)` for row numbers `(M, B)`."""
        return self._rows.index_select(0, indices_MB.reshape(-1)).view(*indices_MB.shape, self.width)

    def gather_tagged(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        """Rows `(..., W)` and their tags `(...)` for row numbers `(...)`."""
        return self.gather(indices), self.tags.index_select(0, indices.reshape(-1)).view(indices.shape)

    def member_rows(self, member: int) -> Tensor:
        """The filled part of a member's ring, `(n, W)`, oldest not first."""
        return self._rows[self._filled(member)]

    def member_tags(self, member: int) -> Tensor:
        """The tags of `member_rows`, `(n,)`."""
        return self.tags[self._filled(member)]

    def _filled(self, member: int) -> slice:
        start = self._start(member)
        return slice(start, start + self.sizes[member])

    def select(self, members: Sequence[int]) -> Replay:
        """A replay with some members only; their rings are copied."""
        other = Replay(self._rows[: self.num_real], len(members), self.capacity, self._rows.device)
        for new, old in enumerate(members):
            other._restore(new, self.member_rows(old), self.member_tags(old), self._cursors[old])
        return other

    def _restore(self, member: int, rows: Tensor, tags: Tensor, cursor: int) -> None:
        self.sizes[member], self._cursors[member] = len(rows), cursor
        filled = self._filled(member)
        self._rows[filled], self.tags[filled] = rows.to(self._rows.device), tags.to(self.tags.device)

    def state_dict(self) -> dict[str, Any]:
        """The rings, their tags and cursors; the dataset's rows are not part of a checkpoint."""
        rings = [self.member_rows(m).clone() for m in range(self.num_members)]
        tags = [self.member_tags(m).clone() for m in range(self.num_members)]
        return {"rings": rings, "tags": tags, "cursors": list(self._cursors)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        of_members = zip(state["rings"], state["tags"], state["cursors"], strict=True)
        for member, (rows, tags, cursor) in enumerate(of_members):
            self._restore(member, rows, tags, cursor)
