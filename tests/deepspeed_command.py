"""`prefloop` under DeepSpeed on CPUs: accelerate launch --use_deepspeed deepspeed_command.py ..."""

from process_worker import without_compiling

from prefloop.cli import main

if __name__ == "__main__":
    without_compiling()
    main()
