//! Replies as bytes: whole, cut anywhere, and self-contradicting.

use super::*;

fn message(kind: u16, flags: u16, body: &[u8]) -> Vec<u8> {
    let length = u32::try_from(HEADER_BYTES + body.len()).unwrap();
    let mut bytes = length.to_ne_bytes().to_vec();
    bytes.extend(kind.to_ne_bytes());
    bytes.extend(flags.to_ne_bytes());
    bytes.extend([0; 8]);
    bytes.extend(body);
    bytes.resize(bytes.len().next_multiple_of(4), 0);
    bytes
}

fn attribute(kind: u16, value: &[u8]) -> Vec<u8> {
    let mut bytes = u16::try_from(4 + value.len()).unwrap().to_ne_bytes().to_vec();
    bytes.extend(kind.to_ne_bytes());
    bytes.extend(value);
    bytes.resize(bytes.len().next_multiple_of(4), 0);
    bytes
}

/// A listener on [::1]:8080 with three of 128 queued.
fn listener() -> Vec<u8> {
    let mut body = vec![AF_INET6, 10, 0, 0];
    body.extend(8080_u16.to_be_bytes());
    body.extend([0; 2]);
    body.extend(Ipv6Addr::LOCALHOST.octets());
    body.extend([0; 20]);
    body.extend(0x0102_0304_u32.to_ne_bytes());
    body.extend(0x0506_0708_u32.to_ne_bytes());
    for word in [0, 3, 128, 1000, 4711_u32] {
        body.extend(word.to_ne_bytes());
    }
    body.extend(attribute(99, b"odd"));
    body.extend(attribute(ATTRIBUTE_SKV6ONLY, &[1]));
    body.extend(attribute(ATTRIBUTE_SKMEMINFO, &(0..9_u32).flat_map(u32::to_ne_bytes).collect::<Vec<_>>()));
    message(SOCK_DIAG_BY_FAMILY, 0, &body)
}

#[test]
fn a_reply_is_read_field_by_field() {
    let mut sockets = Vec::new();
    assert_eq!(parse(&listener(), &mut sockets).unwrap(), Parsed::More);
    let wanted = Socket {
        state: states::LISTEN,
        local: "[::1]:8080".parse().unwrap(),
        remote: "[::]:0".parse().unwrap(),
        inode: 4711,
        cookie: 0x0506_0708_0102_0304,
        uid: 1000,
        recv_queue: 3,
        send_queue: 128,
        drops: Some(8),
        v6only: Some(true),
    };
    assert_eq!(sockets, [wanted]);
    let end = [listener(), message(NLMSG_DONE, 0, &0_u32.to_ne_bytes()), vec![0xff; 3]].concat();
    assert_eq!(parse(&end, &mut sockets).unwrap(), Parsed::Done);
    assert_eq!(sockets.len(), 2);
}

#[test]
fn the_kernels_errors_come_through() {
    let error = |bytes: &[u8]| parse(bytes, &mut Vec::new()).unwrap_err();
    let code = (-libc::EPERM).to_ne_bytes();
    assert_eq!(error(&message(NLMSG_ERROR, 0, &code)).raw_os_error(), Some(libc::EPERM));
    assert_eq!(error(&message(NLMSG_DONE, 0, &code)).raw_os_error(), Some(libc::EPERM));
    let interrupted = message(NLMSG_DONE, NLM_F_DUMP_INTR, &[0; 4]);
    assert_eq!(error(&interrupted).kind(), io::ErrorKind::Interrupted);
}

#[test]
fn a_reply_cut_anywhere_is_an_error_and_never_a_panic() {
    let whole = listener();
    for cut in 1..whole.len() {
        let mut sockets = Vec::new();
        assert!(parse(&whole[..cut], &mut sockets).is_err(), "cut at {cut}");
        // The same with a header that claims that this is all.
        let mut claimed = whole[..cut].to_vec();
        if let Some(length) = claimed.first_chunk_mut::<4>() {
            *length = u32::try_from(cut).unwrap().to_ne_bytes();
        }
        let _ = parse(&claimed, &mut sockets);
    }
    for length in [0_u32, 15, u32::MAX] {
        let mut bytes = whole.clone();
        bytes[..4].copy_from_slice(&length.to_ne_bytes());
        assert_eq!(parse(&bytes, &mut Vec::new()).unwrap_err().kind(), io::ErrorKind::InvalidData);
    }
    let mut bytes = whole;
    bytes[HEADER_BYTES + MESSAGE_BYTES..][..2].copy_from_slice(&2_u16.to_ne_bytes());
    assert_eq!(parse(&bytes, &mut Vec::new()).unwrap_err().kind(), io::ErrorKind::InvalidData);
}

#[test]
fn an_errno_that_is_none_is_an_error_too() {
    for kind in [NLMSG_DONE, NLMSG_ERROR] {
        let reply = message(kind, 0, &i32::MIN.to_ne_bytes());
        assert!(parse(&reply, &mut Vec::new()).is_err());
    }
}

#[test]
fn only_ipv4_is_turned_round() {
    let at = |local: &str| Socket { local: local.parse().unwrap(), ..one() };
    let dumped = ["[::1]:1", "127.0.0.1:3", "[::1]:2", "127.0.0.1:4"].map(at);
    let ports: Vec<u16> = listen_order(dumped.to_vec()).iter().map(|socket| socket.local.port()).collect();
    assert_eq!(ports, [4, 3, 1, 2]);
}

fn one() -> Socket {
    let mut sockets = Vec::new();
    parse(&listener(), &mut sockets).unwrap();
    sockets.remove(0)
}
