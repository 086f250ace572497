from benchmarks.cli import app

# A measuring process imports this file too.
if __name__ == "__main__":
    app(prog_name="python -m benchmarks")
