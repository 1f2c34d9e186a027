"""Update plans: which tensors move together, how, and with which kernel."""
