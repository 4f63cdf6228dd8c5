//! Every way of losing a connection is seen, and named rightly, and counted as the server counts it.

use crate::server::{self, BODY, Server};
use reuseportd_bench::{Error, Fate, Report, Spec, run, spawn};
use std::io::Write;
use std::net::{SocketAddr, TcpStream};
use std::time::Duration;

const N: u64 = 40;
const QUICK: Duration = Duration::from_millis(300);

fn crowd(address: SocketAddr) -> Spec {
    let patient = Duration::from_secs(5);
    Spec::new(address).burst(u32::try_from(N).unwrap(), patient).limit(N).timeouts(patient, patient)
}

/// All of a crowd met this fate, and the server accepted as many.
fn all(fate: Fate, behave: impl Fn(TcpStream) + Send + Sync + 'static) -> Report {
    let server = Server::start(behave);
    let report = run(crowd(server.address).timeouts(Duration::from_secs(5), QUICK)).unwrap();
    assert_eq!(server.finish(), N);
    assert_fates(&report, &[(fate, N)]);
    report
}

fn assert_fates(report: &Report, expected: &[(Fate, u64)]) {
    let met: Vec<_> = report.fates.iter().filter(|(_, connections)| *connections > 0).collect();
    assert_eq!(met, expected, "{report}");
    let lost: u64 =
        expected.iter().filter(|(fate, _)| *fate != Fate::Answered).map(|(_, connections)| connections).sum();
    assert_eq!(report.lost(), lost);
    assert!(report.valid(), "{report}");
}

#[test]
fn a_good_server_answers_all() {
    let report = all(Fate::Answered, |mut stream| {
        server::request(&mut stream).unwrap();
        server::respond(&mut stream, BODY);
    });
    assert_eq!((report.lost(), report.answers, report.losses.len()), (0, N, 0));
}

#[test]
fn nobody_listening_is_refused() {
    let socket = server::bound(0);
    let report = run(crowd(socket.local_addr().unwrap().as_socket().unwrap())).unwrap();
    assert_fates(&report, &[(Fate::Refused, N)]);
}

#[test]
fn a_full_accept_queue_is_timeout_connect() {
    let full = server::listener(0, 0);
    let address = full.local_addr().unwrap();
    let _filler = TcpStream::connect(address).unwrap();
    server::wait_queued(&[&full], 1);
    let report = run(crowd(address).timeouts(QUICK, QUICK)).unwrap();
    assert_fates(&report, &[(Fate::TimeoutConnect, N)]);
}

#[test]
fn reset_before_the_response() {
    all(Fate::ResetBeforeResponse, |mut stream| {
        server::request(&mut stream).unwrap();
        server::reset(stream);
    });
}

#[test]
fn reset_at_once_is_reset_before_the_response() {
    all(Fate::ResetBeforeResponse, server::reset);
}

#[test]
fn reset_in_mid_response() {
    all(Fate::ResetDuringResponse, |mut stream| {
        server::request(&mut stream).unwrap();
        server::respond_half(&mut stream);
        server::reset(stream);
    });
}

#[test]
fn eof_before_the_response() {
    all(Fate::EofBeforeResponse, |mut stream| {
        server::request(&mut stream).unwrap();
    });
}

#[test]
fn half_a_response_is_short() {
    all(Fate::Short, |mut stream| {
        server::request(&mut stream).unwrap();
        server::respond_half(&mut stream);
    });
}

#[test]
fn silence_is_timeout_response() {
    all(Fate::TimeoutResponse, |mut stream| while server::request(&mut stream).is_some() {});
}

#[test]
fn half_a_response_and_then_silence_is_timeout_response() {
    all(Fate::TimeoutResponse, |mut stream| {
        server::request(&mut stream).unwrap();
        server::respond_half(&mut stream);
        while server::request(&mut stream).is_some() {}
    });
}

#[test]
fn another_status_than_200_is_wrong() {
    let report = all(Fate::Wrong, |mut stream| {
        server::request(&mut stream).unwrap();
        write!(stream, "HTTP/1.1 503 Busy\r\nContent-Length: 0\r\n\r\n").unwrap();
    });
    assert!(report.to_string().contains("503 Busy"), "{report}");
}

#[test]
fn closing_a_listener_resets_its_queue() {
    let listener = server::listener(0, 1024);
    let address = listener.local_addr().unwrap();
    let running = spawn(crowd(address)).unwrap();
    server::wait_queued(&[&listener], N);
    for _ in 0..N / 4 {
        let (mut stream, _) = listener.accept().unwrap();
        server::request(&mut stream).unwrap();
        server::respond(&mut stream, BODY);
    }
    drop(listener);
    let report = running.stop_and_join().unwrap();
    assert_fates(&report, &[(Fate::Answered, N / 4), (Fate::ResetBeforeResponse, N - N / 4)]);
}

#[test]
fn closing_one_of_two_listeners_resets_its_part() {
    let closing = server::listener(0, 1024);
    let address = closing.local_addr().unwrap();
    let staying = server::listener(address.port(), 1024);
    let running = spawn(crowd(address)).unwrap();
    server::wait_queued(&[&closing, &staying], N);
    let doomed = server::depth(&closing);
    drop(closing);
    let server = Server::on(staying, |mut stream| {
        server::request(&mut stream).unwrap();
        server::respond(&mut stream, BODY);
    });
    let report = running.stop_and_join().unwrap();
    assert_eq!(server.finish(), N - doomed);
    assert!(doomed > 0 && doomed < N, "all of {N} connections on one side: {doomed}");
    assert_fates(&report, &[(Fate::Answered, N - doomed), (Fate::ResetBeforeResponse, doomed)]);
}

#[test]
fn closing_a_listener_resets_its_half_open_handshakes() {
    let listener = server::listener(0, 1024);
    server::defer_accept(&listener);
    let mut spec = Spec::new(listener.local_addr().unwrap()).half_open(10).limit(10);
    spec.silence = (2 * QUICK, 2 * QUICK);
    let running = spawn(spec).unwrap();
    server::wait_count(1, || server::half_open(&listener));
    running.wait_until(Duration::from_secs(5), |live| live.issued == 10).unwrap();
    // The first may already have spoken when the last comes; those wait in the queue. One that goes there in between is
    // counted twice.
    server::wait_count(10, || server::half_open(&listener) + server::depth(&listener));
    drop(listener);
    assert_fates(&running.stop_and_join().unwrap(), &[(Fate::ResetBeforeResponse, 10)]);
}

#[test]
fn faults_of_the_generator_are_no_losses_but_make_the_run_invalid() {
    // A link-local address without a scope: the kernel has nowhere to send a SYN.
    let report = run(crowd("[fe80::1]:9".parse().unwrap())).unwrap();
    assert_eq!(
        (report.fates.count(Fate::LocalError), report.lost(), report.valid()),
        (N, 0, false),
        "{report}"
    );
    assert!(report.to_string().contains("NOT VALID"), "{report}");
}

#[test]
fn loads_without_content_or_end_are_refused() {
    let address = "127.0.0.1:9".parse().unwrap();
    assert!(matches!(run(Spec::new(address).limit(1)), Err(Error::Spec(_))));
    assert!(matches!(run(Spec::new(address).rate(1.0)), Err(Error::Spec(_))));
    assert!(matches!(spawn(Spec::new(address).rate(f64::NAN)), Err(Error::Spec(_))));
}
