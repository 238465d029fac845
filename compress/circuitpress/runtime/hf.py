"""Makes transformers know the quantization method "circuitpress".

transformers looks up `quant_method` of a config.json in two tables, one for the config's class and one for the
loader's; `register` adds ours to both. It is a module of its own because `import circuitpress` must not import
transformers, and because transformers, when it is imported later, calls back here: see `circuitpress._register`.
"""


def register() -> None:
    """Adds "circuitpress" to transformers' tables; calling it again, also after a reload, changes nothing."""
    # First, and alone: importing it makes the finder of `circuitpress._register` call this function once more, and that
    # inner call must find neither this module nor `quantizer` half imported.
    import transformers.quantizers.auto as tables

    from .quantizer import METHOD, CircuitpressConfig, CircuitpressQuantizer

    if METHOD not in tables.AUTO_QUANTIZATION_CONFIG_MAPPING:
        tables.register_quantization_config(METHOD)(CircuitpressConfig)
    if METHOD not in tables.AUTO_QUANTIZER_MAPPING:
        tables.register_quantizer(METHOD)(CircuitpressQuantizer)
