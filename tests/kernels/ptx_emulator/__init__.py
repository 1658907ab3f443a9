"""Runs what Triton builds for sm_90, without a GPU: an emulator, in numpy, of the PTX instructions it uses.

Triton's interpreter runs the source of a kernel, and computes bfloat16 wrongly. This runs what the compiler made of it:
layouts in registers and shared memory, barriers, copies and products that go on while others run. So it finds what a
GPU and compute-sanitizer would: accesses outside the arguments, races between warps, copies and products that nobody
waits for. It does not see what ptxas makes of the PTX, nor how long anything takes.

    program       PTX text → instructions
    memory        global and shared memory, and which accesses of shared memory race
    arithmetic    what an instruction computes in each thread
    matrices      instructions of a warp on matrices: ldmatrix, stmatrix, mma, wgmma
    asynchronous  copies and products that go on while other instructions run
    machine       threads, branches, barriers: runs a program
    counting      what a kernel asks of the pipes of a multiprocessor, line by line of its source
    driver        stands in for Triton's driver, so that `kernel[grid](…)` takes CPU tensors
    plugin        for pytest: the tests that need a GPU, on the emulator

Sources: NVIDIA's "PTX ISA", version 8.7; for matrix descriptors its section "Asynchronous warpgroup level matrix
instructions".
"""
