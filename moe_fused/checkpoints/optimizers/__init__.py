"""Converts the state of AdamW between layouts of experts, so that an interrupted run resumes in another layout.

AdamW treats every element separately: its moments have the shape of the parameter, and no element's update depends on
another's. A conversion that only moves elements, within a tensor or between tensors, is therefore exact for the state as it
is for the parameter, and the run continues as it would have. This covers

- the weights of experts, between a matrix for each expert, Transformers' stacks, and the original project's stacks;
- LoRA on experts, as far as factors are neither joined nor split: separate factors of gate and up between files per expert
  and the original project's, one pair of factors for both between the fused layouts, and down_proj between all layouts.

All other conversions are refused:

- From gate_up_proj with one lora_A to gate_proj and up_proj with one each, or back. The gradient of the common factor is the
  sum of the two others, so the mean of its squares does not follow from theirs, nor theirs from it. It would also be another
  run, because the factors would be tied where they were not, or the other way round.
- A scaling s that is folded into lora_B. The moments of ``s·B`` are those of B times 1/s and 1/s², but Adam's step does not
  grow with its moments: the same learning rate would move ``s·B`` as far as it moved B.
- Ranks that were padded, because the new elements have no history.
- Tensors that become one and were updated in different numbers of steps, as happens if an expert gets no token in some
  steps. The state has one number of steps for the whole tensor, on which the bias correction depends. On request, the
  largest number is taken.

bitsandbytes' 8-bit AdamW has a scale for every 256 elements of a tensor. Where such a block moves as a whole, so do its
bytes. Otherwise its values are computed and quantized again. Tensors of fewer than 4096 elements are in 32 bits there. Small
tensors that are cut out of larger ones are converted to 32 bits, exactly, and tensors made of small ones stay in 32 bits.

An optimizer numbers its parameters and does not name them. ``parameters`` finds the names, ``state`` reads the file,
``rearrange`` moves the elements, and ``convert`` calls the three.
"""
