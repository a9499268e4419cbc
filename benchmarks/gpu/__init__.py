"""make gpu: what a GPU says of our kernels in the minutes one has it, in two calls.

    make gpu                          prove and measure: smoke, expert layers, kernels, all of verify
    make gpu ARGS="--part tune"       tile sizes, then every layer again, and which backend is faster
    make gpu ARGS=--rehearse          both, on a CPU: the interpreter and the emulator, tiny sizes, every step
    make gpu ARGS=--list              the steps of both parts with the seconds expected of each

Steps run in the order of what one learns from them, each a process of its own with a limit: what hangs,
aborts or loses the device costs itself and nothing else. In the folder --out ($OUT where that is set):

    summary.md     verdicts, every failing case with its reproducer, the table of times; printed last, too
    log.txt        everything the steps printed
    verify.json  smoke.json    every case that was checked
    kernels.jsonl  what each kernel of a layer takes, the machine's two ceilings, the host's time
    results.tgz    CSV files, pictures, REPORT.md, tile sizes, which backend was faster, which is verified
"""
