//! Users that a system has for the parts.

/// User and group id of `name` in what `/etc/passwd` says (passwd(5)), in whatever encoding people's names are there.
///
/// Read as text, so that no name service is loaded into, and waited for by, what is privileged.
#[must_use]
pub fn account(passwd: &[u8], name: &str) -> Option<(u32, u32)> {
    let passwd = String::from_utf8_lossy(passwd);
    let mut fields = passwd.lines().map(|line| line.split(':')).find_map(|mut fields| {
        let found = fields.next() == Some(name);
        found.then_some(fields)
    })?;
    let (_password, uid, gid) = (fields.next()?, fields.next()?, fields.next()?);
    Some((uid.parse().ok()?, gid.parse().ok()?))
}

#[cfg(test)]
mod tests {
    use super::account;

    #[test]
    fn an_account_is_found_by_its_whole_name() {
        let passwd =
            b"root:x:0:0:root:/root:/bin/sh\nlatin:x:1:1:\xe9\xfc:/:\nbrokers:x:7:7::/:\nbroker:x:61:62::/:/bin/false\n";
        assert_eq!(account(passwd, "broker"), Some((61, 62)));
        assert_eq!(account(passwd, "root"), Some((0, 0)));
        assert_eq!(account(passwd, "brok"), None);
        for broken in ["", "broker", "broker:x", "broker:x:1", "broker:x:one:1:", "broker:x:-1:1:"] {
            assert_eq!(account(broken.as_bytes(), "broker"), None, "{broken}");
        }
    }
}
