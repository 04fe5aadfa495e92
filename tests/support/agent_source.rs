//! The built agent as a process, and objects of an API server, for tests of sources.
#![allow(dead_code, clippy::allow_attributes, reason = "every test binary uses another part of this module")]

use std::{
    collections::BTreeMap,
    fs,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};

use k8s_openapi::apiextensions_apiserver::pkg::apis::apiextensions::v1::CustomResourceDefinition;
use kube::{
    Api, Client,
    api::{ApiResource, DeleteParams, DynamicObject, ListParams, Patch, PatchParams},
};
use serde_json::{Value, json};
use tokio::runtime::Runtime;

use crate::apiserver::ApiServer;

/// How long anything may take to come about.
pub const PATIENCE: Duration = Duration::from_secs(30);

/// Waits until `look` returns something.
pub fn until<T>(what: &str, mut look: impl FnMut() -> Option<T>) -> T {
    let deadline = Instant::now() + PATIENCE;
    loop {
        if let Some(found) = look() {
            return found;
        }
        assert!(Instant::now() < deadline, "{what}: not within {PATIENCE:?}");
        std::thread::sleep(Duration::from_millis(10));
    }
}

/// What a remotes file says: pod CIDRs, then service CIDRs, by cluster.
pub type Clusters = BTreeMap<String, String>;

/// An agent on a node of its own.
#[derive(Debug)]
pub struct Agent {
    child: Option<Child>,
    args: Vec<String>,
    dir: PathBuf,
    // Shared by agents that follow each other on one node.
    _place: std::sync::Arc<tempfile::TempDir>,
}

impl Agent {
    /// An agent that keeps nothing but remotes files.
    pub fn new(kubeconfig: &Path, sources: &str, more: &[&str]) -> Self {
        let place = std::sync::Arc::new(tempfile::tempdir().unwrap());
        let dir = place.path().to_owned();
        let mut args: Vec<String> =
            ["run", "--cni-mode", "none", "--resync", "off", "--notrack", "off"].map(String::from).into();
        args.extend(
            ["--preserve-source", "off", "--node-name", "node-1", "--http-address", "127.0.0.1:0"].map(String::from),
        );
        args.extend(["--kubeconfig".into(), kubeconfig.display().to_string(), "--sources".into(), sources.into()]);
        args.extend(["--lib-dir".into(), dir.join("lib").display().to_string()]);
        args.extend(["--run-dir".into(), dir.join("run").display().to_string()]);
        args.extend(more.iter().map(|arg| (*arg).to_owned()));
        let mut agent = Self { child: None, args, dir, _place: place };
        fs::create_dir_all(agent.lib_dir()).unwrap();
        agent.start();
        agent
    }

    /// Starts it again, with the files that it left.
    pub fn start(&mut self) {
        assert!(self.child.is_none());
        let log = fs::OpenOptions::new().create(true).append(true).open(self.dir.join("log")).unwrap();
        let mut command = Command::new(env!("CARGO_BIN_EXE_crosslink-agent"));
        let command = command.args(&self.args).env("RUST_BACKTRACE", "1").stdin(Stdio::null()).stderr(log);
        self.child = Some(command.spawn().unwrap());
    }

    /// Gives a flag another value for the next start.
    pub fn set(&mut self, flag: &str, value: &str) {
        match self.args.iter().position(|arg| arg == flag) {
            Some(place) => self.args[place + 1] = value.to_owned(),
            None => self.args.extend([flag.to_owned(), value.to_owned()]),
        }
    }

    /// Ends it as Kubernetes does, and waits for that.
    pub fn stop(&mut self) {
        let mut child = self.child.take().unwrap();
        let killed = Command::new("kill").args(["-TERM", &child.id().to_string()]).status().unwrap();
        assert!(killed.success());
        let status = until("the agent's end", || child.try_wait().unwrap());
        assert!(status.success(), "{status}: {}", self.log());
    }

    /// Ends it as a crash does.
    pub fn kill(&mut self) {
        let mut child = self.child.take().unwrap();
        child.kill().unwrap();
        child.wait().unwrap();
    }

    /// Its process.
    pub fn pid(&self) -> u32 {
        self.child.as_ref().unwrap().id()
    }

    /// `libDir`.
    pub fn lib_dir(&self) -> PathBuf {
        self.dir.join("lib")
    }

    /// The remotes file of a source.
    pub fn file(&self, source: &str) -> PathBuf {
        self.lib_dir().join(format!("remotes/{source}.json"))
    }

    /// Its log so far.
    pub fn log(&self) -> String {
        fs::read_to_string(self.dir.join("log")).unwrap_or_default()
    }

    /// Writes `node.json`.
    pub fn node(&self, mut facts: Value) {
        facts["version"] = json!(1);
        let path = self.lib_dir().join("node.json");
        fs::write(path.with_extension("new"), facts.to_string()).unwrap();
        fs::rename(path.with_extension("new"), path).unwrap();
    }

    /// The content of a remotes file, checked as its readers check it; none where there is none.
    pub fn read(&self, source: &str) -> Option<Value> {
        let text = fs::read_to_string(self.file(source)).ok()?;
        crosslink_core::remotes::parse(source, &text).unwrap();
        Some(serde_json::from_str(&text).unwrap())
    }

    /// Generation of a remotes file.
    pub fn generation(&self, source: &str) -> u64 {
        self.read(source).unwrap()["generation"].as_u64().unwrap()
    }

    /// What a remotes file says.
    pub fn clusters(&self, source: &str) -> Option<Clusters> {
        let content = self.read(source)?;
        assert_eq!(content["source"], source);
        let list = |value: &Value| {
            let texts = value.as_array().into_iter().flatten().map(|text| text.as_str().unwrap().to_owned());
            texts.collect::<Vec<_>>().join(",")
        };
        let shown = |cluster: &Value| {
            let mtu = cluster["mtu"].as_u64().map(|mtu| format!(" mtu {mtu}")).unwrap_or_default();
            let text = format!("{} {}{mtu}", list(&cluster["podCIDRs"]), list(&cluster["serviceCIDRs"]));
            (cluster["name"].as_str().unwrap().to_owned(), text.trim().to_owned())
        };
        Some(content["clusters"].as_array().unwrap().iter().map(shown).collect())
    }

    /// Waits until a remotes file says exactly this.
    pub fn expect(&self, source: &str, expected: &[(&str, &str)]) {
        let expected: Clusters = expected.iter().map(|(name, text)| ((*name).into(), (*text).into())).collect();
        let deadline = Instant::now() + PATIENCE;
        while self.clusters(source).as_ref() != Some(&expected) {
            let now = self.clusters(source);
            assert!(Instant::now() < deadline, "{now:?} is not {expected:?}:\n{}", self.log());
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    /// Waits until the log has a line with all of these, after `from` bytes.
    pub fn expect_log(&self, from: usize, parts: &[&str]) {
        until(&format!("log line with {parts:?} in:\n{}", self.log()), || {
            let log = self.log();
            log[from..].lines().any(|line| parts.iter().all(|part| line.contains(part))).then_some(())
        });
    }
}

impl Drop for Agent {
    fn drop(&mut self) {
        if let Some(child) = &mut self.child {
            let _ = child.kill();
            let _ = child.wait();
        }
        if std::thread::panicking() {
            eprintln!("--- agent ---\n{}", self.log());
        }
    }
}

/// A kind: group, version, kind, plural.
pub type Kind = (&'static str, &'static str, &'static str, &'static str);

/// Our `Cluster`.
pub const CLUSTER: Kind = ("crosslink.dev", "v1alpha1", "Cluster", "clusters");

/// Objects of an API server, by blocking calls.
pub struct Objects {
    /// Runs the calls.
    pub runtime: Runtime,
    client: Client,
}

impl Objects {
    /// Those of a server, with every right.
    pub fn of(server: &ApiServer) -> Self {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        let client = runtime.block_on(server.client());
        Self { runtime, client }
    }

    /// A client.
    pub fn client(&self) -> Client {
        self.client.clone()
    }

    fn api(&self, kind: Kind, namespace: &str) -> Api<DynamicObject> {
        let (group, version, name, plural) = kind;
        let resource = ApiResource {
            group: group.into(),
            version: version.into(),
            api_version: if group.is_empty() { version.into() } else { format!("{group}/{version}") },
            kind: name.into(),
            plural: plural.into(),
        };
        match namespace {
            "" => Api::all_with(self.client.clone(), &resource),
            _ => Api::namespaced_with(self.client.clone(), namespace, &resource),
        }
    }

    /// Makes the definitions of a YAML text and waits until they are served.
    pub fn define(&self, text: &str) {
        let crds: Api<CustomResourceDefinition> = Api::all(self.client.clone());
        for document in text.split("---\n").filter(|part| part.contains("kind: CustomResourceDefinition")) {
            let crd: CustomResourceDefinition = serde_saphyr::from_str(document).unwrap();
            let name = crd.metadata.name.clone().unwrap();
            let params = PatchParams::apply("test").force();
            until(&format!("definition of {name}"), || {
                self.runtime.block_on(crds.patch(&name, &params, &Patch::Apply(&crd))).ok()
            });
            let plural: &'static str = crd.spec.names.plural.clone().leak();
            let group: &'static str = crd.spec.group.clone().leak();
            let kind: &'static str = crd.spec.names.kind.clone().leak();
            let version: &'static str = crd.spec.versions[0].name.clone().leak();
            let api = self.api((group, version, kind, plural), "");
            until(&format!("{name} being served"), || {
                self.runtime.block_on(api.list(&ListParams::default().limit(1))).ok()
            });
        }
    }

    /// [`Self::define`] with a schema that lets everything through.
    pub fn define_loosely(&self, text: &str) {
        let mut loose = String::new();
        for document in text.split("---\n").filter(|part| part.contains("kind: CustomResourceDefinition")) {
            let mut crd: Value = serde_saphyr::from_str(document).unwrap();
            let any = json!({"x-kubernetes-preserve-unknown-fields": true});
            crd["spec"]["versions"][0]["schema"]["openAPIV3Schema"] =
                json!({"type": "object", "properties": {"spec": any, "status": any}});
            loose.push_str(&format!("---\n{}", serde_saphyr::to_string(&crd).unwrap()));
        }
        self.define(&loose);
    }

    /// Removes a definition with all objects of it, and waits for that.
    pub fn undefine(&self, name: &str) {
        let crds: Api<CustomResourceDefinition> = Api::all(self.client.clone());
        self.runtime.block_on(crds.delete(name, &DeleteParams::default())).unwrap();
        until(&format!("the end of {name}"), || {
            self.runtime.block_on(crds.get_opt(name)).unwrap().is_none().then_some(())
        });
    }

    /// Makes a namespace.
    pub fn namespace(&self, name: &str) {
        self.put(("", "v1", "Namespace", "namespaces"), "", name, json!({}));
    }

    /// Makes or replaces an object; `body` has `spec`, `metadata`, ….
    pub fn put(&self, kind: Kind, namespace: &str, name: &str, body: Value) {
        self.try_put(kind, namespace, name, body).unwrap_or_else(|err| panic!("{kind:?} {name}: {err}"));
    }

    /// [`Self::put`], or what the API server has against it.
    pub fn try_put(&self, kind: Kind, namespace: &str, name: &str, mut body: Value) -> Result<DynamicObject, String> {
        let (group, version, kind_name, _) = kind;
        body["apiVersion"] = json!(if group.is_empty() { version.to_owned() } else { format!("{group}/{version}") });
        body["kind"] = json!(kind_name);
        body["metadata"]["name"] = json!(name);
        let params = PatchParams {
            field_validation: Some(kube::api::ValidationDirective::Strict),
            ..PatchParams::apply("test").force()
        };
        let api = self.api(kind, namespace);
        self.runtime.block_on(api.patch(name, &params, &Patch::Apply(body))).map_err(|err| err.to_string())
    }

    /// Deletes an object, which must be there.
    pub fn delete(&self, kind: Kind, namespace: &str, name: &str) {
        self.runtime.block_on(self.api(kind, namespace).delete(name, &DeleteParams::default())).unwrap();
    }

    /// Deletes all objects of a kind by one request.
    pub fn delete_all(&self, kind: Kind, namespace: &str) {
        let api = self.api(kind, namespace);
        self.runtime.block_on(api.delete_collection(&DeleteParams::default(), &ListParams::default())).unwrap();
    }

    /// An object.
    pub fn get(&self, kind: Kind, namespace: &str, name: &str) -> Value {
        let object = self.runtime.block_on(self.api(kind, namespace).get(name)).unwrap();
        serde_json::to_value(object).unwrap()
    }

    /// A `Cluster` of ours.
    pub fn cluster(&self, name: &str, pods: &[&str], services: &[&str]) {
        self.put(CLUSTER, "", name, json!({"spec": {"podCIDRs": pods, "serviceCIDRs": services}}));
    }
}

/// Our definitions, as the agent prints them.
pub fn crds() -> String {
    let output = Command::new(env!("CARGO_BIN_EXE_crosslink-agent")).arg("crds").output().unwrap();
    assert!(output.status.success());
    String::from_utf8(output.stdout).unwrap()
}
