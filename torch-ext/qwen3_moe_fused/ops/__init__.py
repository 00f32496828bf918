"""The operators that torch knows: their arguments as records, and with those schemas, fakes and autograd."""
