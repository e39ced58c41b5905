package main

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

// Server is an [http.Server] with timeouts against slow clients and a Shutdown
// that loses no request. Shutdown uses the fields Handler, BaseContext and
// ConnState: a function that replaces one of them must call the original.
type Server struct {
	*http.Server
	api         *Handler
	mu          sync.RWMutex    // while it is locked for writing, new requests wait
	closing     atomic.Bool     // each response is the last on its connection
	inFlight    *sync.WaitGroup // requests that began since the last call of drained
	listeners   []net.Listener
	unusedConns sync.Map // the connections without a request so far, as keys
}

// NewServer returns a server for outer, which is api or contains it.
func NewServer(outer http.Handler, api *Handler) *Server {
	s := &Server{api: api, inFlight: new(sync.WaitGroup)}
	s.Server = &http.Server{
		Handler:                      s.track(outer),
		DisableGeneralOptionsHandler: true,     // api answers OPTIONS *
		MaxHeaderBytes:               64 << 10, // a 422 is up to 30 times as long as its query
		ReadHeaderTimeout:            10 * time.Second,
		ReadTimeout:                  time.Minute, // headers and body
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

func (s *Server) addListener(l net.Listener) context.Context {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.listeners = append(s.listeners, l)
	return context.Background() // as net/http does without BaseContext
}

func (s *Server) setConnState(c net.Conn, state http.ConnState) {
	if state == http.StateNew {
		s.unusedConns.Store(c, nil)
	} else {
		s.unusedConns.Delete(c)
	}
}

// Serve is like [http.Server.Serve]. It returns [http.ErrServerClosed] as soon as
// Shutdown has closed l, and so do the methods below.
func (s *Server) Serve(l net.Listener) error { return s.ended(s.Server.Serve(l)) }

// ListenAndServe is like [http.Server.ListenAndServe].
func (s *Server) ListenAndServe() error { return s.ended(s.Server.ListenAndServe()) }

// ServeTLS is like [http.Server.ServeTLS].
func (s *Server) ServeTLS(l net.Listener, cert, key string) error {
	return s.ended(s.Server.ServeTLS(l, cert, key))
}

// ListenAndServeTLS is like [http.Server.ListenAndServeTLS].
func (s *Server) ListenAndServeTLS(cert, key string) error {
	return s.ended(s.Server.ListenAndServeTLS(cert, key))
}

// ended returns the error of a server that ended with err.
func (s *Server) ended(err error) error {
	if s.closing.Load() {
		return http.ErrServerClosed
	}
	return err
}

// Shutdown drains the service, waits for the requests in flight, and closes the
// server. While it waits, new requests are accepted and served, so that probes
// see that the service is not ready; functions of RegisterOnShutdown are called
// after that. If ctx ends first, Shutdown closes all connections and returns
// the error of ctx. It may be called before Serve, and more than once.
//
// [http.Server.Shutdown] alone loses requests: it closes connections on which
// the next request is under way, and answers none that it reads afterwards.
func (s *Server) Shutdown(ctx context.Context) error {
	s.api.Drain()
	select {
	case <-ctx.Done():
	case <-s.drained():
		s.closeListeners()
	}
	for c := range s.unusedConns.Range { // net/http would wait 5 s for them
		_ = c.(net.Conn).Close()
	}
	err := s.Server.Shutdown(ctx)
	if err != nil {
		_ = s.Close()
	}
	return err
}

// drained returns a channel that is closed when the requests in flight have been
// answered. The response to each later request closes its connection.
func (s *Server) drained() <-chan struct{} {
	s.mu.Lock()
	inFlight := s.inFlight
	s.inFlight = new(sync.WaitGroup)
	s.closing.Store(true)
	s.mu.Unlock()
	done := make(chan struct{})
	go func() {
		inFlight.Wait()
		close(done)
	}()
	return done
}

// closeListeners closes the listeners while new requests wait. A client that
// waits for a response does not connect, and the system resets connections that
// have not been accepted when their listener is closed.
func (s *Server) closeListeners() {
	s.mu.Lock()
	pause() // until all clients wait
	for _, l := range s.listeners {
		_ = l.Close()
	}
	s.mu.Unlock()
	pause() // for the first request on connections that have just been accepted
}

// pause waits for data that is under way, about as long as a slow round trip. It
// sleeps in steps, so that there is time to read what arrived while the whole
// process was suspended.
func pause() {
	for range 10 {
		time.Sleep(10 * time.Millisecond)
	}
}
