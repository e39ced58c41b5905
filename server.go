package main

// server.go is the HTTP server: limits against slow clients, and a stop that
// loses no request.

import (
	"context"
	"log/slog"
	"net"
	"net/http"
	"sync"
	"sync/atomic"
	"time"
)

// writeTimeout is the time from the end of a request's headers to the end of
// its response. Options.RequestTimeout has to be shorter.
const writeTimeout = 50 * time.Second

// tick is the interval at which Shutdown polls.
const tick = 10 * time.Millisecond

// Server is an [http.Server] with timeouts against slow clients and a Shutdown
// that loses no request. Shutdown relies on the fields Handler, BaseContext and
// ConnState: a function that replaces one of them must call the original.
type Server struct {
	*http.Server
	api         *Handler
	mu          sync.RWMutex    // while it is locked for writing, new requests wait
	closing     atomic.Bool     // each response is the last on its connection
	inFlight    *sync.WaitGroup // requests that began since the last call of Shutdown
	listeners   []net.Listener
	serving     atomic.Int32 // calls of Serve that have not returned
	unusedConns sync.Map     // as keys
}

// NewServer returns a server for outer, which is api or contains it.
func NewServer(outer http.Handler, api *Handler) *Server {
	s := &Server{api: api, inFlight: new(sync.WaitGroup)}
	s.Server = &http.Server{
		Handler:                      s.track(outer),
		DisableGeneralOptionsHandler: true,     // api answers OPTIONS *
		MaxHeaderBytes:               64 << 10, // a 422 can be 30 times as long as its query
		ReadHeaderTimeout:            10 * time.Second,
		ReadTimeout:                  writeTimeout - 5*time.Second, // headers and body; then a 408 can still be written
		WriteTimeout:                 writeTimeout,
		IdleTimeout:                  11 * time.Minute, // load balancers keep idle connections for up to 10
		BaseContext:                  s.addListener,
		ConnState:                    s.setConnState,
		ErrorLog:                     slog.NewLogLogger(api.opts.Logger.Handler(), slog.LevelWarn),
	}
	return s
}

// track returns a handler that counts the requests to outer.
func (s *Server) track(outer http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		s.mu.RLock()
		inFlight := s.inFlight
		inFlight.Add(1)
		if s.closing.Load() {
			w.Header().Set("Connection", "close")
		}
		s.mu.RUnlock()
		defer inFlight.Done()
		outer.ServeHTTP(w, r)
	})
}

func (s *Server) setConnState(c net.Conn, state http.ConnState) {
	s.unusedConns.Delete(c)
	if state == http.StateNew {
		s.unusedConns.Store(c, nil)
	}
}

// Serve is like [http.Server.Serve]. It returns [http.ErrServerClosed] as soon as
// Shutdown has closed l. ListenAndServe does not call it: after Shutdown it returns
// the listener's error.
func (s *Server) Serve(l net.Listener) error {
	s.serving.Add(1)
	defer s.serving.Add(-1)
	err := s.Server.Serve(l)
	if s.closing.Load() {
		return http.ErrServerClosed
	}
	return err
}

func (s *Server) addListener(l net.Listener) context.Context {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.listeners = append(s.listeners, l)
	return context.Background() // as without BaseContext
}

// Shutdown drains the service, waits for the requests in flight, and closes the
// server. While it waits, new requests are accepted and served, so that probes
// see that the service is not ready; functions of RegisterOnShutdown are called
// after that. If ctx ends first, Shutdown closes all connections, gives the
// requests up to a second to end and to be logged, and returns the error of ctx. It
// may be called before Serve, and more than once.
//
// [http.Server.Shutdown] alone loses requests: it closes connections on which
// the next request is under way, and answers none that it reads afterwards.
func (s *Server) Shutdown(ctx context.Context) error {
	s.api.Drain()
	s.mu.Lock()
	inFlight := s.inFlight
	s.inFlight = new(sync.WaitGroup)
	s.closing.Store(true)
	s.mu.Unlock()
	drained := make(chan struct{})
	go func() { inFlight.Wait(); close(drained) }()
	select {
	case <-ctx.Done():
	case <-drained:
		s.closeListeners()
	}
	for c := range s.unusedConns.Range { // net/http would wait 5 s for them
		_ = c.(net.Conn).Close()
	}
	err := s.Server.Shutdown(ctx)
	if err != nil {
		_ = s.Close() // ends the contexts of the requests
		select {
		case <-drained:
		case <-time.After(time.Second):
		}
	}
	return err
}

// closeListeners closes the listeners while new requests wait: a client that waits
// for a response opens no connection, and closing a listener resets those that it
// has not accepted.
func (s *Server) closeListeners() {
	s.mu.Lock()
	for range 10 { // in steps: after a SIGSTOP, one long sleep would be over before Serve accepts anything
		time.Sleep(tick)
	}
	for _, l := range s.listeners {
		_ = l.Close()
	}
	s.mu.Unlock()
	// A second for the first requests on connections that have just been accepted.
	for waiting, i := true, 0; waiting && i < 100; i++ {
		time.Sleep(tick)
		waiting = s.serving.Load() > 0
		for range s.unusedConns.Range {
			waiting = true
		}
	}
}
