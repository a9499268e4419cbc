"""make gpu: verify and measure our kernels on a GPU that is available for a few minutes, in two calls.

    make gpu                          verify and measure: smoke, expert layers, kernels, all of verify
    make gpu ARGS="--part tune"       tile sizes, then every layer again, and which backend is faster
    make gpu ARGS=--rehearse          both, on a CPU: the interpreter and the emulator, tiny sizes, every step
    make gpu ARGS=--list              the steps of both parts with their expected seconds

Steps run in order of value, each in a separate process with a time limit: a step that hangs, aborts or loses
the device fails alone. Output is in the folder --out ($OUT if that is set):

    summary.md     verdicts, every failing case with its reproducer, the table of times; also printed last
    log.txt        everything the steps printed
    verify.json  smoke.json    every case that was checked
    kernels.jsonl  the time of each kernel of a layer, the machine's two ceilings, the host's time
    results.tgz    CSV files, pictures, REPORT.md, tile sizes, measured.json, verified.json
"""
