//! The difficult worker of the end-to-end tests: slow, silent or faulty on request.
//!
//! It answers each connection, after one line or one HTTP request, with its generation, seat and pid,
//! and closes it. The accept loop can be made slow, so that queues build up and a listener that is closed
//! too early loses connections for all to see.

#![forbid(unsafe_code)]

use std::env;
use std::error::Error;
use std::io::{self, BufRead, BufReader, Write};
use std::net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream};
use std::os::fd::OwnedFd;
use std::process;
use std::thread::{self, Scope};
use std::time::Duration;

use clap::{Parser, ValueEnum};
use nix::libc;
use reuseportd_wire::env as variables;
use reuseportd_worker::{Bound, Listen, Worker};
use rustix::event::{PollFd, PollFlags, poll};
use socket2::{Domain, Socket, Type};

/// Connections that may wait at a listener this program listens on itself.
const BACKLOG: i32 = 4096;

/// Seconds a connection stays half open for want of data, with `--defer-accept`.
const DEFER_ACCEPT_S: usize = 5;

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
    /// What goes wrong.
    #[arg(long, value_enum)]
    fail: Option<Fail>,
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
    /// Accept loops, each with a listener of its own (plain, naive).
    #[arg(long, default_value_t = 1)]
    threads: usize,
    /// Say nothing to NOTIFY_SOCKET (plain, naive).
    #[arg(long)]
    no_notify: bool,
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

fn main() -> Result<(), Box<dyn Error>> {
    let options = Options::parse();
    for line in &options.print {
        eprintln!("{line}");
    }
    if options.fail == Some(Fail::ExitBeforeReady) {
        process::exit(options.code);
    }
    match options.mode {
        Mode::Sdk => speak_the_protocol(&options),
        Mode::Plain => {
            let (stopped, stop) = io::pipe()?;
            signal_hook::low_level::pipe::register(libc::SIGTERM, OwnedFd::from(stop))?;
            listen_myself(&options, Some(&stopped.into()))
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
    if options.fail == Some(Fail::ExitAfterListen) {
        process::exit(options.code);
    }
    thread::scope(|connections| serving.accept_each(|_, stream| serve(options, stream, connections)))?;
    Ok(())
}

fn listen_myself(options: &Options, stopped: Option<&OwnedFd>) -> Result<(), Box<dyn Error>> {
    let text = env::var(variables::LISTEN).unwrap_or_else(|_| options.listen.clone());
    let mut sockets = Vec::new();
    for listen in variables::parse_listen(&text)? {
        for _ in 0..options.threads {
            sockets.push(bind(options, &listen)?);
        }
    }
    if options.fail == Some(Fail::NeverReady) {
        never();
    }
    sockets.iter().try_for_each(|socket| socket.listen(BACKLOG))?;
    if options.fail == Some(Fail::ExitAfterListen) {
        process::exit(options.code);
    }
    work(options.ready_delay);
    if !options.no_notify {
        sd_notify::notify(&[sd_notify::NotifyState::Ready])?;
    }
    thread::scope(|threads| -> io::Result<()> {
        let loops = sockets
            .into_iter()
            .map(|socket| threads.spawn(move || accept_until(options, &socket.into(), stopped, threads)));
        let loops: Vec<_> = loops.collect();
        loops.into_iter().try_for_each(|one| one.join().unwrap_or(Ok(())))
    })?;
    Ok(())
}

/// Returns, and so closes the listener with whatever waits in its queue, when `stopped` can be read.
fn accept_until<'scope>(
    options: &Options,
    listener: &TcpListener,
    stopped: Option<&OwnedFd>,
    connections: &'scope Scope<'scope, '_>,
) -> io::Result<()> {
    loop {
        let mut fds = vec![PollFd::new(listener, PollFlags::IN)];
        fds.extend(stopped.map(|stopped| PollFd::new(stopped, PollFlags::IN)));
        rustix::io::retry_on_intr(|| poll(&mut fds, None))?;
        if fds.get(1).is_some_and(|stopped| !stopped.revents().is_empty()) {
            return Ok(());
        }
        let (stream, _) = listener.accept()?;
        serve(options, stream, connections);
    }
}

fn serve<'scope>(options: &Options, stream: TcpStream, connections: &'scope Scope<'scope, '_>) {
    work(options.accept_delay);
    if options.inline {
        answer(stream);
    } else {
        connections.spawn(|| answer(stream));
    }
}

fn bind(options: &Options, listen: &Listen) -> io::Result<Socket> {
    let address = match options.fail {
        Some(Fail::WrongAddress) => SocketAddr::from((Ipv4Addr::LOCALHOST, 0)),
        _ => listen.address,
    };
    let socket = Socket::new(Domain::for_address(address), Type::STREAM, None)?;
    socket.set_reuse_address(true)?;
    socket.set_reuse_port(options.fail != Some(Fail::NoReuseport))?;
    if options.defer_accept {
        nix::sys::socket::setsockopt(&socket, DeferAccept, &DEFER_ACCEPT_S)?;
    }
    socket.bind(&address.into())?;
    Ok(socket)
}

/// A client that comes and goes, or breaks off, is no error of this program.
fn answer(stream: TcpStream) {
    let _ = try_answer(stream);
}

fn try_answer(stream: TcpStream) -> io::Result<()> {
    let mut request = BufReader::new(&stream);
    let mut line = String::new();
    if request.read_line(&mut line)? == 0 {
        return Ok(());
    }
    let is_http = line.contains(" HTTP/");
    while is_http && !line.trim_end().is_empty() {
        line.clear();
        request.read_line(&mut line)?;
    }
    let variable = |name: &str| env::var(name).unwrap_or_else(|_| "none".to_owned());
    let (generation, seat) = (variable(variables::GENERATION), variable(variables::SEAT));
    let body = format!("generation={generation} seat={seat} pid={}\n", process::id());
    let length = body.len();
    let head = format!("HTTP/1.0 200 OK\r\nContent-Length: {length}\r\nConnection: close\r\n\r\n");
    (&stream).write_all((head + &body).as_bytes())
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
