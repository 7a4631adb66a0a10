"""``python -m deepdisc_ops`` is ``deepdisc-ops``."""

from deepdisc_ops.cli import main

if __name__ == "__main__":
    main()
