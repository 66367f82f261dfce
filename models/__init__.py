"""Networks; knows nothing of differential privacy."""

from .families import FAMILIES as FAMILIES
from .families import family_of as family_of
from .noising import NoisePath as NoisePath
from .noising import Times as Times
from .noising import make_path as make_path
from .noising import make_times as make_times
from .objective import Batch as Batch
from .objective import Family as Family
from .objective import Objective as Objective
from .objective import row_losses as row_losses
from .objective import synthetic_rows as synthetic_rows
from .pipeline import DEFAULT_BASE as DEFAULT_BASE
from .pipeline import ClassConditionalPipeline as ClassConditionalPipeline
from .pipeline import ClassEmbedding as ClassEmbedding
