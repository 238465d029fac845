"""Running packed models: `linear.PackedLinear` and, through transformers, `from_pretrained` (`hf.register`)."""
