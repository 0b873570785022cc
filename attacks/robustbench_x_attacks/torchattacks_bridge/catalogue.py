"""The 36 attacks of torchattacks 3.5.1 that are attacks, with every constructor argument pinned.

Left out: MultiAttack and LGV, wrappers around other attacks (LGV also trains the victim's weights), and VANILA,
which returns its input. Defaults are the field's, not torchattacks', whose own differ wildly from attack to
attack: 100 steps for PGD, Auto-PGD and FAB, 10 for the FGSM family. Step sizes are 2.5 * eps / steps for PGD
and its kin, eps / steps for the momentum family, as in its papers.

Most attacks draw noise, or decide when to stop, for the batch as a whole, so another batch size gives other
images. Attacks that search the smallest change are projected to the budget by the harness.
"""

from robustbench_x_attacks.torchattacks_bridge.entry import Entry
from robustbench_x_attacks.torchattacks_bridge.gradient_entries import GRADIENT
from robustbench_x_attacks.torchattacks_bridge.other_entries import MINIMAL, QUERY

__all__ = ["ENTRIES"]

ENTRIES: tuple[Entry, ...] = GRADIENT + MINIMAL + QUERY
