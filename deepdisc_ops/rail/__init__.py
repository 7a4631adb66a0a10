"""Stages for RAIL, DESC's framework of photometric redshifts: from images to densities beside the codes that read catalogues.

informer: trains an ensemble, or takes one; estimator: images to a qp ensemble and the catalogue; matcher: the galaxies of both that
the truth knows, with magnitudes for other codes and densities on a grid for RAIL's evaluators. handles: what travels between
stages; packed: an ensemble as one file; sights: what an estimator looks at, piece by piece; pipeline.yaml and config.yaml: all of
it in one run of ceci (`python -m deepdisc_ops.rail FOLDER` puts copies of them there).

Needs the extra ``rail``.
"""

from deepdisc_ops.errors import SetupError

try:
    import rail.core.stage  # noqa: F401  # tells of a missing extra in our words
except ModuleNotFoundError as error:
    raise SetupError(f"RAIL cannot be imported ({error}); install it with pip install 'deepdisc-ops[rail]'") from None

from deepdisc_ops.rail.estimator import DeepdiscEstimator
from deepdisc_ops.rail.handles import CatalogHandle, EnsembleHandle, ImagesHandle
from deepdisc_ops.rail.informer import DeepdiscInformer
from deepdisc_ops.rail.matcher import DeepdiscMatcher

__all__ = [
    "CatalogHandle",
    "DeepdiscEstimator",
    "DeepdiscInformer",
    "DeepdiscMatcher",
    "EnsembleHandle",
    "ImagesHandle",
]
