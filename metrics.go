package main

import (
	"bytes"
	"database/sql"
	"fmt"
	"io/fs"
	"math"
	"os"
	"runtime"
	"runtime/debug"
	runtimemetrics "runtime/metrics"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"
)

// metrics counts the requests that a handler serves, and writes the page that
// Prometheus scrapes: these counts, the connection pool, the Go runtime and the
// process. The zero value is ready to use; its methods may be called at once by
// any number of goroutines.
type metrics struct {
	inFlight atomic.Int64 // requests being served, kept by the handler
	series   sync.Map     // labels → *series
}

// labels tell one series from another. A series stays for good, so none of its
// labels may be the client's to choose.
type labels struct {
	route, method string
	status        int
}

// series is a histogram of the time that the requests with the same labels took.
type series struct {
	labels  string // as the page has them
	sum     atomic.Int64
	buckets [buckets]atomic.Int64 // each for itself, not cumulative
}

// buckets is how many a histogram has.
const buckets = 13

// bounds returns the longest time that each bucket holds, in seconds.
func bounds() [buckets]float64 {
	return [...]float64{.001, .0025, .005, .01, .025, .05, .1, .25, .5, 1, 2.5, 5, math.Inf(1)}
}

// observe counts a request that took d to be answered with status. The route is
// the pattern that it matched, never its path. Methods unknown to HTTP count as
// one. Nothing is locked or allocated but for a new series.
func (m *metrics) observe(route, method string, status int, d time.Duration) {
	switch method {
	case "GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "CONNECT", "OPTIONS", "TRACE":
	default:
		method = "other"
	}
	key := labels{route, method, status}
	v, ok := m.series.Load(key)
	if !ok {
		key.method = strings.Clone(method) // net/http's is part of the request line and would keep it alive
		text := label("route", key.route) + "," + label("method", method) + "," + label("status", strconv.Itoa(status))
		v, _ = m.series.LoadOrStore(key, &series{labels: text})
	}
	s, le := v.(*series), bounds()
	i, _ := slices.BinarySearch(le[:], d.Seconds())
	s.sum.Add(int64(d)) // first: see requests
	s.buckets[i].Add(1)
}

// appendTo appends the page, in Prometheus' text format 0.0.4, to b and returns
// the extended buffer. Metrics and series are always in the same order. Requests
// are counted on meanwhile.
func (m *metrics) appendTo(b []byte, pool sql.DBStats) []byte {
	var all []*series
	for _, v := range m.series.Range {
		all = append(all, v.(*series))
	}
	slices.SortFunc(all, func(a, b *series) int { return strings.Compare(a.labels, b.labels) })
	e := exposition(b)
	e.value("http_requests_in_flight", "Requests being served.", float64(m.inFlight.Load()))
	e.requests(all)
	e.pool(pool)
	e.runtime()
	e.process(os.DirFS("/proc"))
	return e
}

// exposition is text in Prometheus' format.
type exposition []byte

// family appends the head of a metric. Its samples follow.
func (e *exposition) family(name, kind, help string) {
	*e = fmt.Appendf(*e, "# HELP %s %s\n# TYPE %s %s\n", name, help, name, kind)
}

// sample appends a sample with labels, separated by commas, or none.
func (e *exposition) sample(name, labels string, v float64) {
	if labels != "" {
		name += "{" + labels + "}"
	}
	*e = append(strconv.AppendFloat(append(*e, name+" "...), v, 'f', -1, 64), '\n')
}

// value appends a metric with one sample and no labels: a counter if the name
// ends in _total, as the names of all counters do and no others, else a gauge.
func (e *exposition) value(name, help string, v float64) {
	kind := "gauge"
	if strings.HasSuffix(name, "_total") {
		kind = "counter"
	}
	e.family(name, kind, help)
	e.sample(name, "", v)
}

// label returns a label with its value in quotes. Three escapes are known to the
// format, so %q would not do.
func label(name, value string) string {
	return name + `="` + strings.NewReplacer(`\`, `\\`, `"`, `\"`, "\n", `\n`).Replace(value) + `"`
}

// requests appends what was observed. Each bucket is read once, so that all the
// counts of a series agree. Its sum, added to first and read last, covers every
// request in the count, and maybe some that came since.
func (e *exposition) requests(all []*series) {
	const total, duration = "http_requests_total", "http_request_duration_seconds"
	var histogram exposition
	e.family(total, "counter", "Requests served.")
	histogram.family(duration, "histogram", "Time it took to serve a request.")
	for _, s := range all {
		n := 0.0
		for i, le := range bounds() {
			n += float64(s.buckets[i].Load())
			histogram.sample(duration+"_bucket", fmt.Sprintf(`%s,le="%v"`, s.labels, le), n)
		}
		histogram.sample(duration+"_sum", s.labels, time.Duration(s.sum.Load()).Seconds())
		histogram.sample(duration+"_count", s.labels, n)
		e.sample(total, s.labels, n)
	}
	*e = append(*e, histogram...)
}

// pool appends the state of the connection pool. There is only one, so no label
// names it.
func (e *exposition) pool(s sql.DBStats) {
	e.value("go_sql_max_open_connections", "Connections that may be open; 0 means any number.", float64(s.MaxOpenConnections))
	e.value("go_sql_open_connections", "Open connections, in use or idle.", float64(s.OpenConnections))
	e.value("go_sql_in_use_connections", "Connections in use.", float64(s.InUse))
	e.value("go_sql_idle_connections", "Idle connections.", float64(s.Idle))
	e.value("go_sql_wait_count_total", "Connections waited for.", float64(s.WaitCount))
	e.value("go_sql_wait_duration_seconds_total", "Time spent waiting for connections.", s.WaitDuration.Seconds())
	e.value("go_sql_max_idle_closed_total", "Connections closed because enough were idle.", float64(s.MaxIdleClosed))
	e.value("go_sql_max_idle_time_closed_total", "Connections closed because they were idle too long.", float64(s.MaxIdleTimeClosed))
	e.value("go_sql_max_lifetime_closed_total", "Connections closed because they were too old.", float64(s.MaxLifetimeClosed))
}

// runtime appends the program's versions and the state of the Go runtime, as far
// as it can be read without stopping the program.
func (e *exposition) runtime() {
	e.family("go_info", "gauge", "The version of Go.")
	e.sample("go_info", label("version", runtime.Version()), 1)
	if b, ok := debug.ReadBuildInfo(); ok {
		e.family("go_build_info", "gauge", "The main module.")
		e.sample("go_build_info", label("checksum", b.Main.Sum)+","+label("path", b.Main.Path)+","+label("version", b.Main.Version), 1)
	}
	for _, row := range [...]struct{ name, help, key string }{
		{"go_goroutines", "Goroutines.", "/sched/goroutines:goroutines"},
		{"go_threads", "Threads of the operating system.", "/sched/threads/total:threads"},
		{"go_memstats_alloc_bytes", "Memory of heap objects.", "/memory/classes/heap/objects:bytes"},
		{"go_memstats_alloc_bytes_total", "Memory allocated for heap objects.", "/gc/heap/allocs:bytes"},
		{"go_memstats_heap_objects", "Heap objects.", "/gc/heap/objects:objects"},
		{"go_memstats_next_gc_bytes", "Size of the heap that the next collection aims at.", "/gc/heap/goal:bytes"},
		{"go_memstats_stack_inuse_bytes", "Memory of stacks.", "/memory/classes/heap/stacks:bytes"},
		{"go_memstats_sys_bytes", "Memory obtained from the operating system.", "/memory/classes/total:bytes"},
	} {
		s := []runtimemetrics.Sample{{Name: row.key}}
		runtimemetrics.Read(s)
		if s[0].Value.Kind() == runtimemetrics.KindUint64 {
			e.value(row.name, row.help, float64(s[0].Value.Uint64()))
		}
	}
}

// process appends what Linux tells of this process in proc, the directory /proc.
// What is not there is left out: on other systems, everything.
func (e *exposition) process(proc fs.FS) {
	const ticks = 100 // a second, wherever Go runs
	stat, _ := fs.ReadFile(proc, "self/stat")
	// Field 2 is the command in parentheses, and may hold blanks and parentheses itself.
	fields := bytes.Fields(stat[bytes.LastIndexByte(stat, ')')+1:])
	if len(fields) < 22 {
		return
	}
	field := func(i int) float64 { v, _ := strconv.ParseFloat(string(fields[i-3]), 64); return v } // numbered as in proc(5)
	e.value("process_cpu_seconds_total", "Processor time used, user and system.", (field(14)+field(15))/ticks)
	e.value("process_virtual_memory_bytes", "Virtual memory.", field(23))
	e.value("process_resident_memory_bytes", "Resident memory.", field(24)*float64(os.Getpagesize()))
	if boot, ok := numberAfter(proc, "stat", "btime"); ok {
		e.value("process_start_time_seconds", "When the process began, in seconds since 1970.", boot+field(22)/ticks)
	}
	if limit, ok := numberAfter(proc, "self/limits", "Max open files"); ok {
		e.value("process_max_fds", "File descriptors that may be open.", limit)
	}
	if fds, err := fs.ReadDir(proc, "self/fd"); err == nil {
		e.value("process_open_fds", "Open file descriptors.", float64(len(fds)-1)) // but the one that counts them
	}
}

// numberAfter returns the number after prefix, which begins a line of the file
// other than the first, and reports whether there is one.
func numberAfter(fsys fs.FS, file, prefix string) (n float64, ok bool) {
	text, _ := fs.ReadFile(fsys, file)
	_, rest, _ := strings.Cut(string(text), "\n"+prefix)
	_, err := fmt.Sscan(rest, &n)
	return n, err == nil
}
