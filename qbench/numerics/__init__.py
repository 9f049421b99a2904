"""Pure functions on tensors: quantize, fold, bias and the epilogue of a QAT layer."""
