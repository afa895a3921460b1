//! Users that a system has for the parts.

/// User and group id of `name` in the text of `/etc/passwd` (passwd(5)).
///
/// Read as text, so that no name service is loaded into, and waited for by, what is privileged.
#[must_use]
pub fn account(passwd: &str, name: &str) -> Option<(u32, u32)> {
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
        let passwd = "root:x:0:0:root:/root:/bin/sh\nbrokers:x:7:7::/:\nbroker:x:61:62::/:/bin/false\n";
        assert_eq!(account(passwd, "broker"), Some((61, 62)));
        assert_eq!(account(passwd, "root"), Some((0, 0)));
        assert_eq!(account(passwd, "brok"), None);
        for broken in ["", "broker", "broker:x", "broker:x:1", "broker:x:one:1:", "broker:x:-1:1:"] {
            assert_eq!(account(broken, "broker"), None, "{broken}");
        }
    }
}
