"""Fine-tune diffusion models with LoRA under differential privacy."""

from .adaptive import Adaptive as Adaptive
from .capture import Capture as Capture
from .clipping import Automatic as Automatic
from .clipping import ClippedSum as ClippedSum
from .clipping import Flat as Flat
from .clipping import PerLayer as PerLayer
from .draws import secure_integers as secure_integers
from .draws import secure_normal as secure_normal
from .draws import secure_normal_like as secure_normal_like
from .dropin import BatchMemoryManager as BatchMemoryManager
from .dropin import DPDataLoader as DPDataLoader
from .dropin import PrivacyEngine as PrivacyEngine
from .errors import PrivacyError as PrivacyError
from .optimizer import DPOptimizer as DPOptimizer
from .passes import make_pass as make_pass
from .plan import PrivacyPlan as PrivacyPlan
from .sampling import PoissonSampler as PoissonSampler
from .selfcheck import check_per_record_grads as check_per_record_grads
