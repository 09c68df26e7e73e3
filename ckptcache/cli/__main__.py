"""``python -m ckptcache.cli`` is ``ckptcache``."""

from ckptcache.cli import main

if __name__ == "__main__":
    main(prog_name="ckptcache")
