//! The difficult worker of the end-to-end tests: slow, silent or faulty on request.
//!
//! It answers each connection, after one line or one HTTP request, with its generation, seat and pid,
//! and closes it. The accept loop can be made slow, so that queues build up and a listener that is closed
//! too early loses connections for all to see.
//!
//! A line `close` or `shutdown` makes it do that to its listeners after the answer, and live on (`close` not in mode sdk
//! without `--ignore-stop`); with `--inline` at once, else when the next connection comes.
//!
//! Of UDP it answers each datagram with `GENERATION SEAT PID ` and the datagram. One that is `crash` ends it with
//! `--code`, `close` closes the socket it came to and leaves the worker alive (not in mode sdk without `--ignore-stop`), `stuck` is
//! never answered, nor anything after it.

#![forbid(unsafe_code)]

use std::collections::BTreeMap;
use std::env;
use std::error::Error;
use std::fs::{self, OpenOptions};
use std::io::{self, BufRead, BufReader, Write};
use std::net::{Ipv4Addr, Ipv6Addr, Shutdown, SocketAddr, TcpStream};
use std::os::fd::{AsFd, OwnedFd};
use std::path::PathBuf;
use std::process;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, LazyLock};
use std::thread::{self, Scope};
use std::time::Duration;

use clap::{Parser, ValueEnum};
use nix::libc;
use reuseportd_wire::env as variables;
use reuseportd_worker::{Bound, Listen, Serving, Watchdog, Worker};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{PidfdFlags, PidfdGetfdFlags, getpid, pidfd_getfd, pidfd_open};
use socket2::{Domain, Socket, Type};

use datagrams::Clients;

/// Connections that may wait at a listener this program listens on itself.
const BACKLOG: i32 = 4096;

/// Seconds a connection stays half open for want of data, with `--defer-accept`.
const DEFER_ACCEPT_S: usize = 5;

#[path = "test_worker/datagrams.rs"]
mod datagrams;

#[derive(Debug, Clone, Parser)]
struct Options {
    /// How it gets along with a master.
    #[arg(long, value_enum, default_value_t = Mode::Sdk)]
    mode: Mode,
    /// Milliseconds of work after each accept(), in the accept loop.
    #[arg(long, value_name = "MS", default_value_t = 0)]
    accept_delay: u64,
    /// Answer in the accept loop, so that a worker never holds more than one accepted connection.
    #[arg(long)]
    inline: bool,
    /// TCP_DEFER_ACCEPT: a connection is half open until its client says something.
    #[arg(long)]
    defer_accept: bool,
    /// Milliseconds of work on each datagram, before it is answered.
    #[arg(long, value_name = "MS", default_value_t = 0)]
    receive_delay: u64,
    /// Answer each UDP client on a connected socket of its own, until it was silent for so many milliseconds.
    #[arg(long, value_name = "MS")]
    connect: Option<u64>,
    /// Serve on when told to stop.
    #[arg(long)]
    ignore_stop: bool,
    /// What goes wrong.
    #[arg(long, value_enum)]
    fail: Option<Fail>,
    /// Nothing goes wrong in seats before this one.
    #[arg(long, value_name = "SEAT", default_value_t = 0)]
    fail_seat: u32,
    /// Nothing goes wrong unless this file is there at the start.
    #[arg(long, value_name = "PATH")]
    fail_if: Option<PathBuf>,
    /// Exit status of a failure that exits.
    #[arg(long, default_value_t = 3)]
    code: i32,
    /// Milliseconds of initialisation: before the sockets are handed over (sdk), or between listening and
    /// READY=1 (plain, naive).
    #[arg(long, value_name = "MS", default_value_t = 0)]
    ready_delay: u64,
    /// A line for standard error; may be repeated.
    #[arg(long, value_name = "TEXT")]
    print: Vec<String>,
    /// Accept loops, each with a listener of its own (plain, naive) or sharing one that was passed (activated).
    #[arg(long, default_value_t = 1)]
    threads: usize,
    /// Say nothing to NOTIFY_SOCKET (plain, naive, activated).
    #[arg(long)]
    no_notify: bool,
    /// IPV6_V6ONLY on what it binds to an IPv6 address.
    #[arg(long)]
    v6only: bool,
    /// Bind [::] where 0.0.0.0 is asked for.
    #[arg(long)]
    dual_stack: bool,
    /// Statuses of the answers to `GET /healthz`, one after the other, and the last of them from then on.
    #[arg(long, value_delimiter = ',', default_value = "200")]
    health: Vec<u16>,
    /// Append a line to this file for every connection accepted, and one for every request.
    #[arg(long, value_name = "PATH")]
    log: Option<PathBuf>,
    /// Addresses, when REUSEPORTD_LISTEN is not set.
    #[arg(long, default_value = "default=tcp:127.0.0.1:8084")]
    listen: String,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Mode {
    /// Speaks the handover protocol.
    Sdk,
    /// Listens itself; on SIGTERM it closes its listeners without draining them and finishes what it has accepted.
    Plain,
    /// Takes the sockets it is passed (LISTEN_FDS), listens itself on the others; SIGTERM as for plain.
    Activated,
    /// Listens itself; SIGTERM ends it at once.
    Naive,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Fail {
    /// Exits before it has a socket.
    ExitBeforeReady,
    /// Exits as soon as its sockets listen.
    ExitAfterListen,
    /// Binds and then says nothing for ever.
    NeverReady,
    /// Binds a port nobody asked for.
    WrongAddress,
    /// Does not set SO_REUSEPORT.
    NoReuseport,
    /// Is ready, and then never accepts, nor gives a sign of life.
    Stuck,
}

/// The option is in none of the socket crates.
#[derive(Debug, Clone, Copy)]
struct DeferAccept;

nix::setsockopt_impl!(
    DeferAccept,
    libc::IPPROTO_TCP,
    libc::TCP_DEFER_ACCEPT,
    usize,
    nix::sys::socket::sockopt::SetUsize
);

/// SIGUSR1 came: the accept loop that takes the next connection is stuck with it.
static STUCK: LazyLock<Arc<AtomicBool>> = LazyLock::new(Arc::default);

/// The line `close` came.
static CLOSES: AtomicBool = AtomicBool::new(false);

fn main() -> Result<(), Box<dyn Error>> {
    let mut options = Options::parse();
    let seat = env::var(variables::SEAT).ok().and_then(|seat| seat.parse::<u32>().ok());
    let is_spared = seat.is_some_and(|seat| seat < options.fail_seat);
    if is_spared || options.fail_if.as_ref().is_some_and(|path| !path.exists()) {
        options.fail = None;
    }
    signal_hook::flag::register(libc::SIGUSR1, Arc::clone(&STUCK))?;
    for line in &options.print {
        eprintln!("{line}");
    }
    if options.fail == Some(Fail::ExitBeforeReady) {
        process::exit(options.code);
    }
    match options.mode {
        Mode::Sdk => speak_the_protocol(&options),
        Mode::Plain | Mode::Activated => {
            let (stopped, stop) = io::pipe()?;
            signal_hook::low_level::pipe::register(libc::SIGTERM, OwnedFd::from(stop))?;
            listen_myself(&options, (!options.ignore_stop).then_some(&stopped.into()))
        }
        Mode::Naive => listen_myself(&options, None),
    }
}

fn speak_the_protocol(options: &Options) -> Result<(), Box<dyn Error>> {
    let worker = Worker::from_env(&options.listen)?;
    let bind = |listen: &Listen| Ok(Bound::new(&listen.name, bind(options, listen)?));
    let bound = worker.listen().iter().map(bind).collect::<io::Result<Vec<Bound>>>()?;
    work(options.ready_delay);
    if options.fail == Some(Fail::NeverReady) {
        never();
    }
    let Some(serving) = worker.ready(bound)? else { return Ok(()) };
    match options.fail {
        Some(Fail::ExitAfterListen) => process::exit(options.code),
        Some(Fail::Stuck) => never(),
        _ => {}
    }
    if options.ignore_stop {
        let Serving { listeners, datagrams, orders: _unheard } = serving;
        let listeners = listeners.into_iter().map(|(_, listener)| listener.into());
        let sockets = listeners.chain(datagrams.into_iter().map(|(_, socket)| socket.into())).collect();
        return Ok(serve_until(options, sockets, None)?);
    }
    let clients = Clients::default();
    thread::scope(|threads| {
        serving.serve_each(
            |_, stream| serve(options, stream, threads),
            |_, socket, datagram, peer| {
                clients.serve(options, socket, datagram, peer, threads);
            },
        )
    })?;
    Ok(())
}

fn listen_myself(options: &Options, stopped: Option<&OwnedFd>) -> Result<(), Box<dyn Error>> {
    let text = env::var(variables::LISTEN).unwrap_or_else(|_| options.listen.clone());
    let passed = if options.mode == Mode::Activated { passed()? } else { BTreeMap::new() };
    // Of those with a path there is one each.
    let unix = variables::parse_unix_listen(&text)?.into_iter().filter_map(|unix| passed.get(&unix.name));
    let mut sockets = unix.map(Socket::try_clone).collect::<io::Result<Vec<Socket>>>()?;
    for listen in variables::parse_listen(&text)? {
        for _ in 0..options.threads {
            sockets.push(match passed.get(&listen.name) {
                Some(socket) => socket.try_clone()?,
                None => bind(options, &listen)?,
            });
        }
    }
    drop(passed);
    if options.fail == Some(Fail::NeverReady) {
        never();
    }
    for socket in &sockets {
        // What was passed listens already, with the backlog of the one who made it.
        if !is_datagram(socket)? && !socket.is_listener()? {
            socket.listen(BACKLOG)?;
        }
    }
    if options.fail == Some(Fail::ExitAfterListen) {
        process::exit(options.code);
    }
    work(options.ready_delay);
    if !options.no_notify {
        sd_notify::notify(&[sd_notify::NotifyState::Ready])?;
    }
    if options.fail == Some(Fail::Stuck) {
        never();
    }
    Ok(serve_until(options, sockets, stopped)?)
}

/// Each socket in a thread.
fn serve_until(options: &Options, sockets: Vec<Socket>, stopped: Option<&OwnedFd>) -> io::Result<()> {
    let clients = Clients::default();
    thread::scope(|threads| {
        let clients = &clients;
        let serve = |socket: Socket| {
            threads.spawn(move || match is_datagram(&socket)? {
                true => datagrams::receive_until(options, socket.into(), stopped, clients, threads),
                false => accept_until(options, socket, stopped, threads),
            })
        };
        let loops: Vec<_> = sockets.into_iter().map(serve).collect();
        loops.into_iter().try_for_each(|one| one.join().unwrap_or(Ok(())))
    })
}

fn is_datagram(socket: &Socket) -> io::Result<bool> {
    Ok(socket.r#type()? == Type::DGRAM)
}

/// The passed sockets by name. Their numbers own nothing: each is taken as if from another process, and then closed.
fn passed() -> io::Result<BTreeMap<String, Socket>> {
    let own = pidfd_open(getpid(), PidfdFlags::empty())?;
    let take = |(number, name)| {
        let socket = Socket::from(pidfd_getfd(&own, number, PidfdGetfdFlags::empty())?);
        nix::unistd::close(number)?;
        // Others accept from it too: who is late must not wait for the next connection.
        socket.set_nonblocking(true)?;
        Ok((name, socket))
    };
    sd_notify::listen_fds_with_names()?.map(take).collect()
}

/// Returns, and so closes the listener with whatever waits in its queue, when `stopped` can be read.
fn accept_until<'scope>(
    options: &'scope Options,
    listener: Socket,
    stopped: Option<&OwnedFd>,
    connections: &'scope Scope<'scope, '_>,
) -> io::Result<()> {
    let ended = until(&listener, stopped, || match listener.accept() {
        Ok((stream, _)) => {
            // Of a socket with a path too: both are read and written alike.
            serve(options, stream.into(), connections);
            if CLOSES.load(Ordering::Relaxed) { Err(io::ErrorKind::BrokenPipe.into()) } else { Ok(()) }
        }
        Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(()),
        // By the line `shutdown`: nothing can be accepted any more.
        Err(error) if error.kind() == io::ErrorKind::InvalidInput => {
            CLOSES.store(true, Ordering::Relaxed);
            Err(error)
        }
        Err(error) => Err(error),
    });
    if CLOSES.load(Ordering::Relaxed) {
        drop(listener);
        let Some(stopped) = stopped else { never() };
        return until(stopped, None, || Err(io::ErrorKind::BrokenPipe.into())).or(Ok(()));
    }
    ended
}

/// Acts when the socket can be read, until `stopped` can be.
fn until(
    socket: impl AsFd,
    stopped: Option<&OwnedFd>,
    mut act: impl FnMut() -> io::Result<()>,
) -> io::Result<()> {
    let mut watchdog = Watchdog::from_env().map_err(io::Error::other)?;
    loop {
        let timeout = watchdog.as_mut().map(Watchdog::feed).transpose().map_err(io::Error::other)?;
        let timeout = timeout.map(|timeout| Timespec::try_from(timeout).unwrap_or_default());
        let mut fds = vec![PollFd::new(&socket, PollFlags::IN)];
        fds.extend(stopped.map(|stopped| PollFd::new(stopped, PollFlags::IN)));
        rustix::io::retry_on_intr(|| poll(&mut fds, timeout.as_ref()))?;
        if fds.get(1).is_some_and(|stopped| !stopped.revents().is_empty()) {
            return Ok(());
        }
        if !fds[0].revents().is_empty() {
            act()?;
        }
    }
}

fn serve<'scope>(options: &'scope Options, stream: TcpStream, connections: &'scope Scope<'scope, '_>) {
    note(options, &stream, "accepted");
    if STUCK.load(Ordering::Relaxed) {
        note(options, &stream, "stuck");
        never();
    }
    work(options.accept_delay);
    if options.inline {
        answer(options, stream);
    } else {
        connections.spawn(|| answer(options, stream));
    }
}

/// Logs what became of a connection.
fn note(options: &Options, stream: &TcpStream, what: &str) {
    let peer = stream.peer_addr().map_or_else(|_| "gone".to_owned(), |peer| peer.to_string());
    log(options, &peer, what);
}

fn log(options: &Options, peer: &str, what: &str) {
    let Some(path) = &options.log else { return };
    let line = format!("{} peer={peer} {what}\n", who());
    let file = OpenOptions::new().create(true).append(true).open(path);
    if let Err(error) = file.and_then(|mut file| file.write_all(line.as_bytes())) {
        eprintln!("{}: {error}", path.display());
    }
}

fn who() -> String {
    let variable = |name: &str| env::var(name).unwrap_or_else(|_| "none".to_owned());
    let (generation, seat) = (variable(variables::GENERATION), variable(variables::SEAT));
    format!("generation={generation} seat={seat} pid={}", process::id())
}

fn bind(options: &Options, listen: &Listen) -> io::Result<Socket> {
    let address = match options.fail {
        Some(Fail::WrongAddress) => SocketAddr::from((Ipv4Addr::LOCALHOST, 0)),
        _ if options.dual_stack && listen.address.ip() == Ipv4Addr::UNSPECIFIED => {
            SocketAddr::from((Ipv6Addr::UNSPECIFIED, listen.address.port()))
        }
        _ => listen.address,
    };
    let is_tcp = listen.protocol == variables::Protocol::Tcp;
    let kind = if is_tcp { Type::STREAM } else { Type::DGRAM };
    let socket = Socket::new(Domain::for_address(address), kind, None)?;
    // With UDP it would let anybody share the port.
    socket.set_reuse_address(is_tcp)?;
    socket.set_reuse_port(options.fail != Some(Fail::NoReuseport))?;
    if address.is_ipv6() {
        socket.set_only_v6(options.v6only)?;
    }
    if options.defer_accept && is_tcp {
        nix::sys::socket::setsockopt(&socket, DeferAccept, &DEFER_ACCEPT_S)?;
    }
    socket.bind(&address.into())?;
    Ok(socket)
}

/// A client that comes and goes, or breaks off, is no error of this program.
fn answer(options: &Options, stream: TcpStream) {
    let _ = try_answer(options, stream);
}

fn try_answer(options: &Options, stream: TcpStream) -> io::Result<()> {
    let mut request = BufReader::new(&stream);
    let mut line = String::new();
    if request.read_line(&mut line)? == 0 {
        return Ok(());
    }
    note(options, &stream, line.trim_end());
    let is_http = line.contains(" HTTP/");
    match line.trim_end() {
        "close" => CLOSES.store(true, Ordering::Relaxed),
        "shutdown" => shut_down_listeners()?,
        _ => {}
    }
    let status = if line.starts_with("GET /healthz") { health(options) } else { 200 };
    while is_http && !line.trim_end().is_empty() {
        line.clear();
        request.read_line(&mut line)?;
    }
    let body = who() + "\n";
    let length = body.len();
    let head = format!("HTTP/1.0 {status} So\r\nContent-Length: {length}\r\nConnection: close\r\n\r\n");
    (&stream).write_all((head + &body).as_bytes())
}

/// By another descriptor of the same sockets.
fn shut_down_listeners() -> io::Result<()> {
    let own = pidfd_open(getpid(), PidfdFlags::empty())?;
    for entry in fs::read_dir("/proc/self/fd")? {
        let number = entry?.file_name().to_string_lossy().parse::<i32>().map_err(io::Error::other)?;
        let Ok(socket) = pidfd_getfd(&own, number, PidfdGetfdFlags::empty()).map(Socket::from) else {
            continue;
        };
        if socket.is_listener().unwrap_or(false) {
            socket.shutdown(Shutdown::Read)?;
        }
    }
    Ok(())
}

/// The status of the next answer about this worker's health.
fn health(options: &Options) -> u16 {
    static ASKED: AtomicUsize = AtomicUsize::new(0);
    let turn = ASKED.fetch_add(1, Ordering::Relaxed);
    options.health.get(turn).or(options.health.last()).copied().unwrap_or(200)
}

/// The simulated work of initialising or of accepting.
fn work(ms: u64) {
    thread::sleep(Duration::from_millis(ms));
}

fn never() -> ! {
    loop {
        thread::park();
    }
}
