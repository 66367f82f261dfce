"""Attacks on the engine with canaries of its own: lower bounds on ε, and tests of the noise."""

from .bounds import ErrorRates as ErrorRates
from .bounds import bound_error_rates as bound_error_rates
from .bounds import epsilon_lower_bound as epsilon_lower_bound
from .bounds import gdp_delta as gdp_delta
from .bounds import gdp_epsilon as gdp_epsilon
from .bounds import mu_lower_bound as mu_lower_bound
from .canaries import MAX_GRAD_NORM as MAX_GRAD_NORM
from .canaries import check_number_of_canaries as check_number_of_canaries
from .inversion import subsampled_epsilon_lower_bound as subsampled_epsilon_lower_bound
from .residuals import Check as Check
from .residuals import check_rate as check_rate
from .residuals import check_releases as check_releases
from .residuals import chi_square as chi_square
from .residuals import noise_interval as noise_interval
from .runs import Releases as Releases
from .runs import Scores as Scores
from .runs import many_steps as many_steps
from .runs import one_step as one_step
from .runs import toss as toss
from .thresholds import threshold_for_epsilon as threshold_for_epsilon
from .thresholds import threshold_for_inversion as threshold_for_inversion
