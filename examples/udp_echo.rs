//! A UDP and TCP echo service on the SDK that says who answers: `GENERATION SEAT PID ` comes before what was sent.
//!
//! Without a master: `cargo run --example udp_echo`, then `nc -u 127.0.0.1 8085`, or without `-u` over TCP.

#![forbid(unsafe_code)]

use std::error::Error;
use std::io::{Read, Write};
use std::net::TcpStream;
use std::thread;

use reuseportd_worker::Worker;

fn main() -> Result<(), Box<dyn Error>> {
    let worker = Worker::from_env("udp=udp:127.0.0.1:8085;tcp=tcp:127.0.0.1:8085")?;
    let who = format!("{} {} {} ", worker.generation(), worker.seat(), std::process::id());
    // From here on the master may have datagrams sent to the UDP socket: they wait there until `serve_each`.
    let bound = worker.bind()?;
    let Some(serving) = worker.ready(bound)? else {
        return Ok(()); // The upgrade was called off before this worker served.
    };
    thread::scope(|connections| {
        serving.serve_each(
            |_listener, stream| {
                connections.spawn(|| echo(stream, &who));
            },
            |_listener, socket, datagram, peer| {
                let answer = [who.as_bytes(), datagram].concat();
                // A client that is gone, or more answers than the network takes, is no error of this program.
                let _ = socket.send_to(&answer, peer);
            },
        )
    })?;
    Ok(())
}

/// Until the client has finished or is gone; neither is an error of this program.
fn echo(mut stream: TcpStream, who: &str) {
    let mut buffer = [0; 4096];
    while let Ok(length @ 1..) = stream.read(&mut buffer) {
        if stream.write_all(&[who.as_bytes(), &buffer[..length]].concat()).is_err() {
            return;
        }
    }
}
