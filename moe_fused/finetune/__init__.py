"""``moe-fused finetune``: from a model and a data set to an adapter, on TRL's SFTTrainer.

    options   what a run can be told: the command line and the YAML file are made of this table
    command   the command itself
    data      rows of a file or of the Hub, checked before anything is loaded
    model     the model in 4 bits with adapters on it
    plan      what the run needs in memory (``moe_fused.memory``), and what is chosen by that
    batches   packed documents in batches of one shape
    attention causal attention over them, without masks
    graphs    the decoder's passes as CUDA graphs
    host      a step without what costs the host most
    trainer   SFTTrainer with checkpoints that are whole or absent, and an end at the first loss that is not finite
    progress  what the terminal and log.jsonl show
    results   the adapter, its card and the plot
    run       the order in which all of this happens

A run's directory holds ``finetune.yaml`` from its first step on, ``checkpoints/`` and ``log.jsonl`` while it trains, and in
the end the adapter. ``adapter_config.json`` is written last, so an adapter that can be loaded is whole.
"""
