"""``moe-fused finetune``: from a model and a data set to an adapter, on TRL's SFTTrainer.

From the options a run is resolved once, into a frozen record that all later steps read:

    options       the table of options, which the command line and the YAML file are made from
    mixture       the data sets that --dataset names, with their shares
    command       the command itself
    handed_through  fields of TRL's and PEFT's configs among the options, and those that the run manages itself
    precheck      checks that need the standard library alone, and the process among those of the run
    launch        torchrun for --gpus, which runs the command once for each GPU
    resolve       the records of a run: every question that the options leave open, answered once
    architecture  facts about a model's architecture by which they are answered
    plan          the memory that a run needs, and the choice of the first record that fits
    space         the room on disk that a run needs
    duration      the time that a run takes, where its steps were measured

The data, before the model is loaded:

    rows          files, directories and data sets on the Hub as rows, each with its place
    text_files    files of text as rows, each with its line
    formats       the forms that rows may have, and the one form that each kind becomes
    render        a row as tokens and labels, by the chat template
    tokenizing    all rows of a data set as tokens and labels
    bad_rows      rows that cannot be trained on, and their names in errors
    mix           rows that are set aside for the evaluation, and rows of several data sets as one
    data          all rows as sequences: checked, cut, packed and counted
    preferences   rows with several answers, or with labels, in the columns of TRL's trainers
    stream        the same while the run trains, for data that are not read as a whole
    show          rows as they will be trained, and the first sequences of them, printed for people
    fingerprint   the hashes of the data and the model that a run began with, so that a change of them is noticed

The model and its training:

    model         the config, the tokenizer, and the model in 4 bits
    start         the adapter that a run goes on from
    adapters      PEFT's config for the adapters, and the model with them
    attention     causal attention over packed documents, without masks
    varlen        the kernels that compute it, and which of them was measured to be the fastest
    kept_attention  results of attention that are kept when layers are computed again
    projections   linear layers with LoRA in fewer passes, those that share an input together
    batches       packed documents in batches of one shape
    graphs        the decoder's passes as CUDA graphs
    host          a training step without the work that costs the host most
    adamw         steps of 8-bit AdamW over many parameters in one launch
    adamw_device  the kernel for these
    arguments     the arguments of TRL's trainers for a run
    trainer       TRL's trainers with checkpoints that are whole or absent, which keep the best and end early
    evaluation    the loss of evaluations, and the end of a run whose loss does not get lower
    parallel      the processes of a run on several GPUs: what they tell each other, and how all end when one does
    several       what a trainer does otherwise when there are several processes
    sharding      a model whose experts and adapters the processes divide among them
    trackers      where trackers of experiments write
    progress      the progress on the terminal and in log.jsonl

The directory of a run, and its end:

    output        whether a run may begin or go on in a directory, and who uses it
    checkpoints   the checkpoints of a run, and whether it can go on from them
    results       the adapter, its card and the plot of the loss, written so that they are whole
    card          the text of the model card
    facts         what the card tells of a run
    usage         how to use the adapter, as the card tells it
    markdown      the Markdown of the card, whatever characters a name has
    next_commands the commands that go on from an adapter
    upload        the adapter or the checkpoints of a run as commits on the Hub
    checkpoint_uploads  the same for checkpoints, while the run trains
    push          the command that uploads what a run has written
    endings       the errors that a run expects, and what is said when it ends before its time
    run           the order in which all of this happens

The directory of a run holds ``finetune.yaml`` from the first step on, ``checkpoints/`` and ``log.jsonl`` while it
trains, and the adapter in the end. ``adapter_config.json`` is written last, so an adapter that can be loaded is whole.
"""
