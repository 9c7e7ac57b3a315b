"""The service with workers that can be told to die: see faulty_worker.py."""

from statecodec_server import main, supervisor

supervisor.WORKER = "faulty_worker"

if __name__ == "__main__":
    main.main()
