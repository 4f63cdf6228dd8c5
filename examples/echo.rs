//! A threaded TCP echo service that answers in upper case, on the SDK. One thread per connection.
//!
//! Without a master: `cargo run --example echo`, then `nc 127.0.0.1 8081`.

#![forbid(unsafe_code)]

use std::error::Error;
use std::io::{Read, Write};
use std::net::TcpStream;
use std::thread;

use reuseportd_worker::Worker;

fn main() -> Result<(), Box<dyn Error>> {
    let worker = Worker::from_env("default=tcp:127.0.0.1:8081")?;
    // The program's own initialisation belongs here: `ready` promises that it can serve.
    let bound = worker.bind()?;
    let Some(serving) = worker.ready(bound)? else {
        return Ok(()); // The upgrade was called off before this worker served.
    };
    // The scope ends when every connection is finished: that is the graceful stop.
    thread::scope(|connections| {
        serving.accept_each(|_listener, stream| {
            connections.spawn(|| echo(stream));
        })
    })?;
    Ok(())
}

/// Until the client has finished or is gone; neither is an error of this program.
fn echo(mut stream: TcpStream) {
    let mut buffer = [0; 4096];
    while let Ok(length @ 1..) = stream.read(&mut buffer) {
        buffer[..length].make_ascii_uppercase();
        if stream.write_all(&buffer[..length]).is_err() {
            return;
        }
    }
}
