"""What becomes of noised gradients: filters, then an optimizer's update of the weights.

Nothing here sees a private value. The inputs are the noised mean gradient, the weights that came of
earlier ones, and public numbers; what is computed from them is post-processing, which costs no
privacy (Dwork and Roth, The Algorithmic Foundations of Differential Privacy, Proposition 2.1).
"""

from .adamw_bc import AdamWBC as AdamWBC
from .filters import Filter as Filter
from .filters import Identity as Identity
from .filters import LaplacianSmoothing as LaplacianSmoothing
from .filters import LowPass as LowPass
from .lamb import Lamb as Lamb
