//! A server that never heard of SO_REUSEPORT: it binds the addresses it is given and answers each connection.
//!
//! Nothing but the standard library is used, so that it can be built by `rustc` alone, and as a static binary.

use std::io::{BufRead, BufReader, Result, Write};
use std::net::{TcpListener, TcpStream};
use std::{env, process, thread};

fn answer(stream: &TcpStream) -> Result<()> {
    let mut lines = BufReader::new(stream).lines();
    // An HTTP request ends with an empty line.
    while lines.next().transpose()?.is_some_and(|line| !line.is_empty()) {}
    let generation = env::var("REUSEPORTD_GENERATION").unwrap_or_default();
    let body = format!("generation={generation}\n");
    let mut stream = stream;
    write!(stream, "HTTP/1.0 200 OK\r\nContent-Length: {}\r\n\r\n{body}", body.len())
}

fn main() {
    let listeners = env::args().skip(1).map(|address| {
        TcpListener::bind(&address).unwrap_or_else(|error| {
            eprintln!("cannot bind {address}: {error}");
            process::exit(1)
        })
    });
    let serve = |listener: TcpListener| {
        for stream in listener.incoming().flatten() {
            // A client that has gone away is no concern of the others.
            thread::spawn(move || drop(answer(&stream)));
        }
    };
    let threads: Vec<_> =
        listeners.collect::<Vec<_>>().into_iter().map(|l| thread::spawn(move || serve(l))).collect();
    for thread in threads {
        let _ = thread.join();
    }
}
