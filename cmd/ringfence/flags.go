package main

import (
	"errors"
	"flag"
	"fmt"
	"io"
)

// parse reads the flags of a command that takes no arguments. When there is nothing more to
// do, because help was asked for or the command line is wrong, it says so and done is true;
// code is what to exit with.
func parse(flags *flag.FlagSet, usage string, args []string, stdout, stderr io.Writer) (code int, done bool) {
	help := func(w io.Writer) {
		fmt.Fprint(w, usage)
		flags.SetOutput(w)
		flags.PrintDefaults()
	}
	flags.SetOutput(stderr)
	flags.Usage = func() {}
	switch err := flags.Parse(args); {
	case errors.Is(err, flag.ErrHelp):
		help(stdout)
		return exitOK, true
	case err != nil:
		fmt.Fprintln(stderr)
		help(stderr)
		return exitUsage, true
	case flags.NArg() > 0:
		fmt.Fprintf(stderr, "ringfence %s: unexpected argument %q\n\n", flags.Name(), flags.Arg(0))
		help(stderr)
		return exitUsage, true
	}
	return exitOK, false
}
