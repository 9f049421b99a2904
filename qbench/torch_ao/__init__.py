"""What `torch.ao.quantization` left in a model, told by the names of its classes: torch.ao itself is never imported.

It is about to be deleted from PyTorch, and importing it warns. A model that holds its modules has imported it already;
one that does not needs nothing of it.
"""

from qbench.torch_ao.adoption import adopt
from qbench.torch_ao.qconfigs import translate_qconfig

__all__ = ["adopt", "translate_qconfig"]
