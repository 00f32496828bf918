"""The state of AdamW between layouts of the parameters of experts, so that an interrupted run resumes in the other.

AdamW treats every element on its own: its moments lie as the parameter does, and no element's update depends on another's.
Whatever only puts elements into another place, and into tensors of another number, is therefore exact for the state as for
the parameter, and the run goes on as it would have. That covers

- the weights of experts, between a matrix for each expert, Transformers' stacks, and the original project's;
- LoRA on experts, as far as each factor keeps to itself: gate and up with factors of their own between files per expert and
  the original's, one pair of factors for both between the fused layouts, and down_proj between all.

What does more than that is refused:

- from gate_up_proj with one lora_A to gate_proj and up_proj with one each, or back. The gradient of the common one is the
  sum of the others', so that its squares' mean does not follow from theirs, nor theirs from it. And it is another run: the
  factors would be tied where they were not, or not where they were.
- scaling folded into lora_B. Moments of ``s·B`` are those of B times 1/s and 1/s², but Adam's step does not grow with its
  moments: the same learning rate would move ``s·B`` as far as it moved B.
- ranks that were filled up: the new elements have no history.
- tensors that become one and have made different numbers of steps, as experts do that saw no token in some of them: the
  state has one number for all, on which the correction of its bias depends. On request the number becomes the largest.

bitsandbytes' 8-bit AdamW has a scale for every 256 elements of a tensor. Where these blocks move as they are, so do their
bytes; else their values are computed and quantized again. Tensors of less than 4096 elements are in 32 bits there: those
that are cut out of larger ones become so, exactly, and what is put together of such stays so.

An optimizer numbers its parameters, it does not name them. ``parameters`` finds the names, ``state`` reads the file,
``rearrange`` moves the elements, and ``convert`` puts it all together.
"""
