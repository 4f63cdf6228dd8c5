//! An HTTP worker on the SDK inside tokio: `GET /` says who answers, `GET /slow?ms=500` takes its time.
//!
//! When told to stop it accepts what is left in its queues, finishes every request it has begun, tells
//! clients that keep their connection to come again on a new one, and exits with 0.
//!
//! Without a master: `cargo run --example http_tokio`, then `curl http://127.0.0.1:8080/`.

#![forbid(unsafe_code)]

use std::error::Error;
use std::io;
use std::os::fd::AsFd;
use std::time::Duration;

use reuseportd_worker::{Order, Orders, Watchdog, Worker, drain};
use tokio::io::{AsyncReadExt, AsyncWriteExt, Interest};
use tokio::net::{TcpListener, TcpStream, UnixStream};
use tokio::sync::watch;
use tokio::task::JoinSet;

/// Longest request head in bytes.
const HEAD_BYTES_MAX: usize = 16 * 1024;

/// How long a client may take for a request.
const REQUEST_TIMEOUT: Duration = Duration::from_secs(30);

/// How long, once stopping, a kept connection is open for one more request. Closing it at once would
/// cut off a request that is on its way.
const KEPT_TIMEOUT: Duration = Duration::from_millis(500);

/// How long to wait before accepting again when descriptors have run out: nothing tells when there are some.
const EXHAUSTED_PAUSE: Duration = Duration::from_millis(20);

#[tokio::main(flavor = "current_thread")]
async fn main() -> Result<(), Box<dyn Error>> {
    let worker = Worker::from_env("http=tcp:127.0.0.1:8080")?;
    let (generation, seat, pid) = (worker.generation(), worker.seat(), std::process::id());
    let service = Service {
        body: format!("{{\"generation\":{generation},\"seat\":{seat},\"pid\":{pid}}}\n"),
        stopping: watch::Sender::new(false),
    };
    let bound = worker.bind()?;
    // This blocks, and may: nothing else is to be done before the master says `serve`.
    let Some(serving) = worker.ready(bound)? else { return Ok(()) };
    let mut accepting = JoinSet::new();
    for (_, listener) in serving.listeners {
        listener.set_nonblocking(true)?;
        accepting.spawn(service.clone().accept(TcpListener::from_std(listener)?));
    }
    let mut orders = serving.orders;
    let channel = watched(&orders)?;
    // With one thread for everything, a timer that fires shows that the loop under it goes round.
    tokio::spawn(live());
    loop {
        match next_order(&mut orders, &channel).await? {
            Order::Stop => break,
            Order::Take { name, listener } => {
                let count = service.clone().drain(listener).await?;
                orders.taken(&name, count)?;
            }
            Order::MasterGone => {}
        }
    }
    service.stopping.send_replace(true);
    while let Some(stopped) = accepting.join_next().await {
        // Through tokio a queue can't be seen to be empty: it may not have looked yet.
        service.clone().drain(stopped??.into_std()?).await?;
    }
    orders.drained()?;
    // Each connection holds a receiver: the last one gone, everything is finished.
    service.stopping.closed().await;
    Ok(())
}

/// Gives the signs of life the master waits for, if it does.
async fn live() -> Result<(), reuseportd_worker::Error> {
    let Some(mut watchdog) = Watchdog::from_env()? else { return Ok(()) };
    loop {
        tokio::time::sleep(watchdog.feed()?).await;
    }
}

/// The channel as something tokio can wait on; only ever asked whether it is readable.
fn watched(orders: &Orders) -> io::Result<UnixStream> {
    let channel = std::os::unix::net::UnixStream::from(orders.as_fd().try_clone_to_owned()?);
    channel.set_nonblocking(true)?;
    UnixStream::from_std(channel)
}

async fn next_order(orders: &mut Orders, channel: &UnixStream) -> io::Result<Order> {
    loop {
        channel.readable().await?;
        let next = || orders.try_next_order().ok_or(io::ErrorKind::WouldBlock.into());
        match channel.try_io(Interest::READABLE, next) {
            Err(none) if none.kind() == io::ErrorKind::WouldBlock => {}
            order => return order,
        }
    }
}

#[derive(Debug, Clone)]
struct Service {
    body: String,
    /// Becomes true once. Connections and accept loops watch it.
    stopping: watch::Sender<bool>,
}

impl Service {
    /// Accepts until stopping, and gives the listener back for its queue to be drained.
    async fn accept(self, listener: TcpListener) -> io::Result<TcpListener> {
        let mut stopping = self.stopping.subscribe();
        loop {
            tokio::select! {
                accepted = listener.accept() => match accepted {
                    Ok((stream, _)) => self.begin(stream),
                    Err(_) => tokio::time::sleep(EXHAUSTED_PAUSE).await,
                },
                () = stopped(&mut stopping) => return Ok(listener),
            }
        }
    }

    /// Empties and closes a listener, on a thread that may wait when descriptors have run out: connections go
    /// on meanwhile, and give some back.
    async fn drain(self, listener: std::net::TcpListener) -> Result<u32, Box<dyn Error>> {
        Ok(tokio::task::spawn_blocking(move || drain(&listener, |stream| self.spawn(stream))).await??)
    }

    fn spawn(&self, stream: std::net::TcpStream) {
        let stream = stream.set_nonblocking(true).and_then(|()| TcpStream::from_std(stream));
        if let Ok(stream) = stream {
            self.begin(stream);
        }
    }

    fn begin(&self, stream: TcpStream) {
        let (body, stopping) = (self.body.clone(), self.stopping.subscribe());
        // A client that breaks off is no error of this program.
        tokio::spawn(async move { drop(converse(stream, &body, stopping).await) });
    }
}

/// Answers the requests of one connection, one after the other.
async fn converse(mut stream: TcpStream, body: &str, mut stopping: watch::Receiver<bool>) -> io::Result<()> {
    let mut unread = Vec::new();
    let mut is_first = true;
    loop {
        let limit = limit(is_first, &mut stopping);
        let Some(head) = (tokio::select! {
            head = head(&mut stream, &mut unread) => head?,
            () = limit => None,
        }) else {
            return Ok(());
        };
        is_first = false;
        let request = Request::parse(&head);
        if let Some(pause) = request.pause {
            tokio::time::sleep(pause).await;
        }
        let keep = request.keep && !*stopping.borrow();
        let (status, body) = if request.is_get { ("200 OK", body) } else { ("405 Method Not Allowed", "") };
        let (length, connection) = (body.len(), if keep { "keep-alive" } else { "close" });
        let answer = format!(
            "HTTP/1.1 {status}\r\nContent-Type: application/json\r\nContent-Length: {length}\r\nConnection: {connection}\r\n\r\n{body}"
        );
        stream.write_all(answer.as_bytes()).await?;
        if !keep {
            return stream.shutdown().await;
        }
    }
}

/// Ends when a client has had time enough for its next request.
async fn limit(is_first: bool, stopping: &mut watch::Receiver<bool>) {
    let kept_too_long = async {
        stopped(stopping).await;
        tokio::time::sleep(KEPT_TIMEOUT).await;
    };
    tokio::select! {
        () = tokio::time::sleep(REQUEST_TIMEOUT) => {}
        () = kept_too_long, if !is_first => {}
    }
}

async fn stopped(stopping: &mut watch::Receiver<bool>) {
    // The sender outlives all who wait, so there is no other outcome.
    drop(stopping.wait_for(|stopping| *stopping).await);
}

/// The next request head, or `None` at the end of the connection. What follows it stays in `unread`.
async fn head(stream: &mut TcpStream, unread: &mut Vec<u8>) -> io::Result<Option<String>> {
    loop {
        if let Some(end) = unread.windows(4).position(|window| window == b"\r\n\r\n") {
            let rest = unread.split_off(end + 4);
            let head = std::mem::replace(unread, rest);
            return Ok(Some(String::from_utf8_lossy(&head).into_owned()));
        }
        if unread.len() > HEAD_BYTES_MAX || stream.read_buf(unread).await? == 0 {
            return Ok(None);
        }
    }
}

struct Request {
    is_get: bool,
    keep: bool,
    pause: Option<Duration>,
}

impl Request {
    /// As much of HTTP as this example needs: no request it accepts has a body.
    fn parse(head: &str) -> Self {
        let mut lines = head.lines();
        let line = lines.next().unwrap_or("");
        let mut words = line.split(' ');
        let is_get = words.next() == Some("GET");
        let pause =
            words.next().and_then(|target| target.strip_prefix("/slow?ms=")).and_then(|ms| ms.parse().ok());
        let closes = lines.any(|header| header.eq_ignore_ascii_case("connection: close"));
        let keep = is_get && !closes && line.ends_with(" HTTP/1.1");
        Self { is_get, keep, pause: pause.map(Duration::from_millis) }
    }
}
