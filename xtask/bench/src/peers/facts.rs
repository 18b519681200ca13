//! The machine and the versions of all programs, for the report.

use std::{fs, process::Command};

use quota_testkit::gateways::system;

use super::{Options, packages};

/// Returns one line about the machine.
pub(crate) fn machine() -> String {
    let read = |path: &str| fs::read_to_string(path).unwrap_or_default();
    let (model, cores) = processor(&read("/proc/cpuinfo"));
    let os = read("/etc/os-release");
    let os = os
        .lines()
        .find_map(|line| line.strip_prefix("PRETTY_NAME="))
        .unwrap_or("unknown system");
    format!(
        "{model}, {cores} cores; {}; Linux {}",
        os.trim_matches('"'),
        read("/proc/sys/kernel/osrelease").trim()
    )
}

/// Returns the model and the number of cores, from `/proc/cpuinfo`.
fn processor(text: &str) -> (String, usize) {
    let values = || {
        text.lines().filter_map(|line| {
            let (name, value) = line.split_once(':')?;
            (name.trim() == "model name").then(|| value.trim().to_owned())
        })
    };
    let model = values().next().unwrap_or_else(|| "unknown CPU".to_owned());
    (model, values().count())
}

/// Returns the versions of all programs and packages.
pub(crate) fn versions(options: &Options) -> Vec<String> {
    let mut versions = Vec::new();
    let mut quota = Command::new(&options.quota);
    for (name, command) in [
        ("Quota", quota.arg("--version")),
        ("nginx", system("nginx").arg("-v")),
        ("HAProxy", system("haproxy").arg("-v")),
        ("Node.js", Command::new("node").arg("--version")),
        ("Python", Command::new("python3").arg("--version")),
        ("Redis", Command::new("redis-server").arg("--version")),
    ] {
        versions.push(format!("{name} {}", asked(command)));
    }
    if let Some(limitador) = &options.limitador {
        versions.push(format!(
            "limitador {}",
            asked(Command::new(limitador).arg("--version"))
        ));
    }
    let read = |name: &str| fs::read_to_string(packages::folder().join(name)).unwrap_or_default();
    versions.extend(npm(&read("fastify/package.json")));
    versions.extend(pypi(&read("fastapi/requirements.txt")));
    versions
}

/// Returns the version that a program reports.
fn asked(command: &mut Command) -> String {
    let output = command.output().map(|it| [it.stdout, it.stderr].concat());
    let output = output.unwrap_or_default();
    version(&String::from_utf8_lossy(&output)).unwrap_or_else(|| "unknown".to_owned())
}

/// Returns the first word that looks like a version, such as `1.22.1` in `nginx version: nginx/1.22.1`.
fn version(output: &str) -> Option<String> {
    output
        .split(|c: char| c.is_whitespace() || matches!(c, '/' | '=' | '-'))
        .map(|word| word.trim_start_matches('v'))
        .find(|word| word.starts_with(|c: char| c.is_ascii_digit()) && word.contains('.'))
        .map(str::to_owned)
}

/// Returns the names and versions of the dependencies in a `package.json` file.
fn npm(text: &str) -> Vec<String> {
    let package: serde_json::Value = serde_json::from_str(text).unwrap_or_default();
    let dependencies = package["dependencies"].as_object();
    let dependencies = dependencies.into_iter().flatten();
    dependencies
        .map(|(name, version)| format!("{name} {}", version.as_str().unwrap_or("unknown")))
        .collect()
}

/// Returns the names and versions of the packages in a `requirements.txt` file.
fn pypi(text: &str) -> Vec<String> {
    text.lines().map(|line| line.replace("==", " ")).collect()
}

#[cfg(test)]
mod tests {
    use super::{npm, processor, pypi, version};

    #[test]
    fn versions_are_found_in_the_output_of_programs() {
        for (output, expected) in [
            ("nginx version: nginx/1.22.1\n", "1.22.1"),
            (
                "HAProxy version 2.6.12-1+deb12u4 2026/10/17 - https://haproxy.org/\n",
                "2.6.12",
            ),
            ("v20.20.2\n", "20.20.2"),
            (
                "Redis server v=7.0.15 sha=00000000:0 malloc=jemalloc-5.3.0 bits=64\n",
                "7.0.15",
            ),
        ] {
            assert_eq!(version(output).as_deref(), Some(expected));
        }
        assert_eq!(version("not found"), None);
    }

    #[test]
    fn the_processor_is_named_once_and_its_cores_are_counted() {
        let text =
            "processor\t: 0\nmodel name\t: AMD EPYC\n\nprocessor\t: 1\nmodel name\t: AMD EPYC\n";
        assert_eq!(processor(text), ("AMD EPYC".to_owned(), 2));
        assert_eq!(processor(""), ("unknown CPU".to_owned(), 0));
    }

    #[test]
    fn packages_are_listed_with_their_versions() {
        assert_eq!(
            npm(r#"{"dependencies": {"fastify": "5.12.8"}}"#),
            ["fastify 5.12.8"]
        );
        assert_eq!(
            pypi("uvicorn[standard]==0.54.0\n"),
            ["uvicorn[standard] 0.54.0"]
        );
    }
}
