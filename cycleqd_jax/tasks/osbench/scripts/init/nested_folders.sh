here=$PWD
for ((depth = 1; depth <= 10; depth++)); do
  mkdir "folder$depth" && cd "folder$depth" && touch echo-love
done
cd "$here/folder1/folder2/folder3/folder4/folder5"
printf '#!/bin/bash\necho "I love myself."\n' > echo-love
chmod +x echo-love
