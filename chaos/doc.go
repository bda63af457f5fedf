// Command chaos breaks real Redis servers in every way that docs/faults.md lists, while
// processes limit on them, and says whether each promise held.
//
//	go run ./chaos [-fault name,name] [-again] [-results file] [-doc file]
//
// Every fault is injected once for all of its cells: a cell is one failure policy and one
// algorithm, with two processes (rings) of its own that share eight keys. It prints one
// table and exits with 1 when a cell broke a bound, or could not be run, for want of a
// privilege for example: nothing is skipped.
//
// Finished cells are kept under .cache/chaos and not run again until the code changes, so
// that a run that was interrupted goes on where it was; -again forgets them. A run of all
// faults writes results.json, and -doc the document.
package main
