// Command bench measures ringfence beside other Redis rate limiters: the same calls, on
// the same server, in turns. It starts the servers itself, on 127.0.0.1 and without
// persistence, writes bench/results.json and bench/run.json, and from these two alone
// docs/benchmarks.md and its charts.
//
//	go run . -dir ..                      everything, about 25 minutes on two cores
//	go run . -dir .. -short               the same cells, shorter, about 4 minutes
//	go run . -dir .. -workloads hot,zipf -systems ringfence,redis_rate -callers 64
//	go run . -dir .. -report              only the document, from the stored results
//
// A cell is one system under one workload with one number of callers. Of each cell every
// round runs once, the systems in turns, so that what slows the machine for a while slows
// them all; what is published is the median of the rounds and its spread. A cell during
// which other programs took more than 12 % of the machine is run again, a bounded number
// of times. Every cell begins with an empty server and a client of its own, and ends by
// comparing how many calls were granted with how many the limit admits.
//
// Unix only: the CPU time of the process comes from getrusage.
package main
