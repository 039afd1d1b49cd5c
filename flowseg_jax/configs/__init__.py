"""The experiments that come along: `from flowseg_jax.configs.shapes_tiny import get_config`.

Installed, their files lie in this folder. In a checkout they lie in `configs/` of the repository, where they are edited.
"""

from flowseg_jax.system.paths import ROOT

__path__ = [str(ROOT / "configs")]
