//! What is in `contrib` for Kubernetes, and the manifests in `docs/SCALING.md`: valid, consistent in themselves, and in
//! accord with the program.

use std::collections::BTreeSet;

use serde::Deserialize as _;
use serde_yaml::Value;

use crate::support::client::Request;
use crate::support::proxy::Proxy;
use crate::support::upstream::Upstream;

const KUBERNETES: &str = include_str!("../../contrib/kubernetes.yaml");
const SCALING: &str = include_str!("../../docs/SCALING.md");
const MIB: u64 = 1024 * 1024;

fn documents(yaml: &str) -> Vec<Value> {
    let documents = serde_yaml::Deserializer::from_str(yaml).map(Value::deserialize);
    documents.collect::<Result<_, _>>().expect("valid YAML")
}

fn of_kind(kind: &str) -> Value {
    let found = documents(KUBERNETES).into_iter().find(|document| document["kind"] == kind);
    found.unwrap_or_else(|| panic!("no {kind} in contrib/kubernetes.yaml"))
}

/// The configuration that the ConfigMap holds.
fn configuration() -> String {
    of_kind("ConfigMap")["data"]["config.yaml"].as_str().expect("a text").to_owned()
}

fn pod() -> Value {
    of_kind("Deployment")["spec"]["template"]["spec"].clone()
}

fn seconds(value: &Value) -> u64 {
    value.as_u64().unwrap_or_else(|| panic!("not a number of seconds: {value:?}"))
}

/// The manifests that the page shows.
fn manifests() -> Vec<Value> {
    let blocks = SCALING.split("```yaml\n").skip(1).map(|rest| rest.split("```").next().expect("an end"));
    blocks.flat_map(documents).collect()
}

fn keys_of(value: &Value, keys: &mut BTreeSet<String>) {
    match value {
        Value::Mapping(mapping) => {
            for (key, value) in mapping {
                keys.extend(key.as_str().map(str::to_owned));
                keys_of(value, keys);
            }
        }
        Value::Sequence(values) => values.iter().for_each(|value| keys_of(value, keys)),
        _ => {}
    }
}

#[test]
fn the_pause_and_the_drain_fit_into_the_grace_period() {
    let pod = pod();
    let pause = seconds(&pod["containers"][0]["lifecycle"]["preStop"]["sleep"]["seconds"]);
    let own: Value = serde_yaml::from_str(&configuration()).expect("valid YAML");
    let drain = seconds(&own["server"]["drain_timeout"]);
    let grace = seconds(&pod["terminationGracePeriodSeconds"]);
    assert!(pause > 0 && pause + drain < grace, "{pause} + {drain} s within {grace} s");
}

#[test]
fn bodies_leave_half_of_the_memory_to_the_rest() {
    let limit = &pod()["containers"][0]["resources"]["limits"]["memory"];
    let limit = limit.as_str().and_then(|text| text.strip_suffix("Mi")?.parse::<u64>().ok());
    let own: Value = serde_yaml::from_str(&configuration()).expect("valid YAML");
    let bodies = own["limits"]["max_buffered_bytes"].as_u64().expect("a number of bytes");
    assert!(bodies * 2 <= limit.expect("a limit in Mi") * MIB, "{bodies} bytes within {limit:?} Mi");
}

#[test]
fn names_ports_and_variables_refer_to_something() {
    let deployment = of_kind("Deployment");
    let labels = &deployment["spec"]["template"]["metadata"]["labels"];
    let service = of_kind("Service");
    assert_eq!(&deployment["spec"]["selector"]["matchLabels"], labels);
    assert_eq!(&service["spec"]["selector"], labels);
    let container = &pod()["containers"][0];
    let port = &container["ports"][0];
    assert_eq!((&port["name"], port["containerPort"].as_u64()), (&Value::from("http"), Some(8000)));
    assert!(!configuration().contains("port:"), "the default port is the container's");
    assert_eq!(service["spec"]["ports"][0]["targetPort"], port["name"]);
    let secret = of_kind("Secret");
    assert_eq!(container["envFrom"][0]["secretRef"]["name"], secret["metadata"]["name"]);
    let configuration = configuration();
    let variables: Vec<_> =
        configuration.split("${").skip(1).map(|rest| rest.split('}').next().expect("an end")).collect();
    assert_eq!(variables.len(), 3);
    for variable in variables {
        assert!(secret["stringData"][variable].is_string(), "{variable} is not in the Secret");
    }
    let volume = &pod()["volumes"][0];
    assert_eq!(volume["name"], container["volumeMounts"][0]["name"]);
    assert_eq!(volume["configMap"]["name"], of_kind("ConfigMap")["metadata"]["name"]);
}

#[test]
fn the_probes_ask_for_what_the_program_answers() {
    let upstream = Upstream::start();
    let proxy = Proxy::with(&[&upstream]).start();
    let container = &pod()["containers"][0];
    for probe in ["readinessProbe", "livenessProbe"] {
        let path = container[probe]["httpGet"]["path"].as_str().expect("a path");
        assert_eq!(proxy.ask(&Request::get(path)).status(), 200, "{probe} asks {path}");
    }
}

#[test]
fn the_page_names_keys_that_are_there() {
    let manifests = manifests();
    let ingress = manifests.iter().find(|manifest| manifest["kind"] == "Ingress").expect("an Ingress");
    let backend = &ingress["spec"]["rules"][0]["http"]["paths"][0]["backend"]["service"];
    let service = of_kind("Service");
    assert_eq!(backend["name"], service["metadata"]["name"]);
    assert_eq!(backend["port"]["name"], service["spec"]["ports"][0]["name"]);
    let mut keys = BTreeSet::new();
    for document in documents(KUBERNETES).iter().chain(&manifests) {
        keys_of(document, &mut keys);
    }
    let section = SCALING.split("### Kubernetes").nth(1).expect("a section on Kubernetes");
    // Kubernetes writes its keys in camel case, claude-lb does not.
    let is_key = |word: &&str| {
        word.starts_with(|c: char| c.is_ascii_lowercase())
            && word.contains(|c: char| c.is_ascii_uppercase())
            && word.chars().all(|c| c.is_ascii_alphabetic())
    };
    let named: Vec<_> = section.split('`').skip(1).step_by(2).filter(is_key).collect();
    assert!(named.len() >= 6, "{named:?}");
    for name in named {
        assert!(keys.contains(name), "{name} is in no manifest");
    }
}
