"""What computes a training pass: equations in torch, kernels for a processor, and the record that names them."""
