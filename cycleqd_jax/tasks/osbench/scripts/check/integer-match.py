import sys

sys.exit(int(sys.argv[1]) != int(sys.argv[2]))
