"""Say how a number of GPUs share the work of one WAN job. Imports nothing heavy."""

from __future__ import annotations

from attrs import frozen

#: The setting that says how many GPUs a job uses.
GPUS_VARIABLE = "OURVIDZ_WAN_GPUS"
#: With guidance a step predicts twice: for the prompt and for what shall not be seen.
BRANCHES = 2


@frozen(kw_only=True)
class RankPlan:
    """Who predicts what. Ranks are counted guidance group by guidance group."""

    #: GPUs that were offered.
    offered: int
    #: 2: one group of ranks predicts for the prompt, the other for the negative prompt; 1: one predicts for both.
    guidance: int
    #: Ranks that share each prediction, by Ulysses: each a part of the video, and in attention a part of the heads.
    context: int

    @property
    def ranks(self) -> int:
        """GPUs that are used."""
        return self.guidance * self.context

    @property
    def leaders(self) -> tuple[int, ...]:
        """The first rank of each guidance group."""
        return tuple(group * self.context for group in range(self.guidance))

    def branches_of(self, rank: int, count: int) -> range:
        """Which of ``count`` predictions ``rank`` takes part in; without guidance there is only one."""
        if self.guidance == 1:
            return range(count)
        group = rank // self.context
        return range(group, min(group + 1, count))

    def describe(self) -> str:
        """The plan in words.

        >>> plan_ranks(4, heads=12).describe()
        '4 GPUs: 2 for the prompt and 2 for the negative prompt'
        >>> plan_ranks(5, heads=12).describe()
        '5 GPUs, of which 4 are used: 2 for the prompt and 2 for the negative prompt'
        >>> plan_ranks(3, heads=12).describe()
        '3 GPUs: 3 for both prompts'
        """
        offered = f"{self.offered} GPU" + "s" * (self.offered > 1)
        used = (
            "" if self.ranks == self.offered else f", of which {self.ranks} {'is' if self.ranks == 1 else 'are'} used"
        )
        shares = "for both prompts"
        if self.guidance == BRANCHES:
            shares = f"for the prompt and {self.context} for the negative prompt"
        return f"{offered}{used}: {self.context} {shares}"


def plan_ranks(offered: int, *, heads: int) -> RankPlan:
    """The plan that uses most of the GPUs, and of those the one with the least exchange.

    ``heads`` are the model's attention heads: Ulysses deals them out evenly.

    >>> plan_ranks(6, heads=12)
    RankPlan(offered=6, guidance=2, context=3)
    """
    if offered < 1:
        raise ValueError(f"a job needs at least one GPU, not {offered}")
    plans = [
        RankPlan(offered=offered, guidance=guidance, context=context)
        for guidance in (1, BRANCHES)
        for context in range(1, offered // guidance + 1)
        if heads % context == 0
    ]
    return max(plans, key=lambda plan: (plan.ranks, plan.guidance))
